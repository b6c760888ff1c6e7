"""A training step without a model, for tests of what happens around the step.

It stands where the compiled one does, so that a run through the command line reads its data and its
base, saves checkpoints and writes its adapter, but compiles no model.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace

import jax
import jax.numpy as jnp
import pytest

from droplora_jax.runs import train_run
from droplora_jax.training import evaluation
from droplora_jax.training.compiled_step import CompiledStep


@jax.jit
def _advance(state, batch, change):
    """The next state, whose adapters depend on all batches so far, and the number of targets."""
    tokens = jnp.sum(batch["targets"] >= 0)
    adapters = jax.tree.map(lambda x: x + change * (tokens % 7 + 1).astype(x.dtype), state.adapters)
    return replace(state, step=state.step + 1, adapters=adapters), tokens


class FakeStep:
    """Counts, and moves every trained number by `change` times a number that the batch gives.

    The loss of step n is `loss(n)`. `spoil(n, state)` may return another state after it.
    """

    def __init__(
        self,
        change: float = 1e-3,
        loss: Callable[[int], float] = lambda step: 5.0 / step,
        spoil: Callable[[int, object], object] = lambda step, state: state,
    ) -> None:
        self.change, self.loss, self.spoil = change, loss, spoil
        self.mask_roots: list[jax.Array] = []

    def __call__(self, state, mask_keys, frozen, batch, mask_root):
        self.mask_roots.append(mask_root)
        state, tokens = _advance(state, batch, self.change)
        number = int(state.step)
        loss = jnp.asarray(self.loss(number), jnp.float32)
        metrics = {"loss": loss, "grad_norm": jnp.ones(()), "tokens": tokens}
        return self.spoil(number, state), metrics

    def as_text(self) -> str:
        return ""


def use(
    patch: pytest.MonkeyPatch,
    step: FakeStep | None = None,
    eval_loss: Callable[[], float] | None = None,
) -> FakeStep:
    """Let runs of this process take a fake step, and evaluate to `eval_loss()`."""
    step = step or FakeStep()
    patch.setattr(train_run, "compile_step", lambda *_: CompiledStep(step, "nothing", None, 0.0))
    patch.setattr(evaluation, "_mean_loss", lambda *_: 1.0 if eval_loss is None else eval_loss())
    return step
