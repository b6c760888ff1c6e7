"""Masks for a trainer that takes a loss and batches, and does the rest itself.

    trainer.with_loss_fn(masked_loss(loss, mask_key))   # Tunix's names; any trainer will do
    trainer.eval_loss_fn = loss                         # evaluation has no mask
    trainer.train(numbered(batches), eval_batches)

The step travels in the batch, so the masks of a batch are the same whatever ran before: a run that
was resumed draws those of one that was not. Training on batches without it is an error, not a
training without masks.
"""

from __future__ import annotations

import inspect
from collections.abc import Callable, Iterable, Iterator, Mapping
from typing import TypeVar

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Key

from droplora_jax.adapters.surgery import masked
from droplora_jax.core.errors import InputError

STEP, ROWS = "step", "rows"

Loss = TypeVar("Loss")


def numbered(batches: Iterable[object], *, microbatches: int = 1) -> Iterator[dict[str, object]]:
    """Batches with the step they belong to, `step` [], and their rows' places in it, `rows` [B].

    Args:
      batches: mappings, from the first of the run on, also where it is resumed (Tunix skips those
        that it has seen); every value has this process's rows in front.
      microbatches: how many batches make one step, where gradients are accumulated.

    Raises:
      InputError: a batch that is no mapping, or has `step` or `rows` already.
    """
    for n, batch in enumerate(batches):
        if not isinstance(batch, Mapping):
            raise InputError(f"a batch is a {type(batch).__name__}: give mappings of arrays")
        if taken := {STEP, ROWS} & batch.keys():
            raise InputError(f"a batch has {sorted(taken)} already: give it another name")
        size = len(next(iter(batch.values())))
        microbatch = n % microbatches * jax.process_count() + jax.process_index()
        rows = microbatch * size + np.arange(size, dtype=np.int32)
        yield {**batch, STEP: np.asarray(n // microbatches, np.int32), ROWS: rows.astype(np.int32)}


def masked_loss(
    loss: Callable[..., Loss],
    mask_key: Key[Array, ""],
    *,
    share: Callable[[Array], Array] | None = None,
) -> Callable[..., Loss]:
    """`loss` with the masks that belong to a batch of `numbered`, for training only.

    Args:
      loss: a function of the model, its first argument, and of what is in a batch.
      mask_key: the root of the run's masks; the step is folded into it.
      share: a schedule of the factor on the drop rates, `config.share(steps)`; None if constant.

    Returns:
      A function of what `loss` takes, and of `step` and `rows`.
    """
    # Named one by one, since `nnx.value_and_grad` turns keywords into places.
    signature = _with_number(inspect.signature(loss))
    model = next(iter(signature.parameters))

    def of_batch(*args: object, **kwargs: object) -> Loss:
        bound = signature.bind(*args, **kwargs)
        step, rows = (bound.arguments.pop(name, None) for name in (STEP, ROWS))
        if step is None or rows is None:
            raise InputError(
                f"a batch has no {STEP!r} and {ROWS!r}: train on numbered(batches), and evaluate "
                "with the loss itself"
            )
        step_key = jax.random.fold_in(mask_key, step)
        bound.arguments[model] = masked(
            bound.arguments[model],
            step_key,
            rows=jnp.asarray(rows),
            share=None if share is None else share(step),
        )
        return loss(*bound.args, **bound.kwargs)

    of_batch.__signature__ = signature  # type: ignore[attr-defined]
    return of_batch


def _with_number(signature: inspect.Signature) -> inspect.Signature:
    """The same, with `step` and `rows` behind what can be given by place."""
    kind = inspect.Parameter.POSITIONAL_OR_KEYWORD
    parameters = [*signature.parameters.values()]
    by_place = [p for p in parameters if p.kind <= kind]
    number = [inspect.Parameter(name, kind, default=None) for name in (STEP, ROWS)]
    return signature.replace(parameters=[*by_place, *number, *parameters[len(by_place) :]])
