"""Cross-entropy of next tokens, without the logits of a whole batch.

Letters: `B` batch, `T` position, `D` model width, `V` vocabulary.
"""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from typing import Any

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float, Int

IGNORE = -1  # a target that has no loss
BLOCKS = 8  # of positions, whose logits exist one block at a time

Project = Callable[..., Array]  # hidden [B, T, D] and what else it needs to logits [B, T, V]
Loss = tuple[Float[Array, ""], Int[Array, ""]]


def cross_entropy(logits_BTV: Float[Array, "B T V"], targets_BT: Int[Array, "B T"]) -> Loss:
    """Summed negative log-likelihood of the targets in float32, and how many there are.

    Targets equal to `IGNORE` count for nothing.
    """
    logits = logits_BTV.astype(jnp.float32)
    labelled = targets_BT != IGNORE
    index = jnp.where(labelled, targets_BT, 0)[..., None]
    target_logits = jnp.take_along_axis(logits, index, axis=-1)[..., 0]
    losses = jax.nn.logsumexp(logits, axis=-1) - target_logits
    return jnp.sum(losses, where=labelled), jnp.sum(labelled, dtype=jnp.int32)


def projected_cross_entropy(
    project: Callable[[Float[Array, "B T D"]], Float[Array, "B T V"]],
    x_BTD: Float[Array, "B T D"],
    targets_BT: Int[Array, "B T"],
) -> Loss:
    """`cross_entropy(project(x), targets)`, a few positions at a time.

    The gradient of a block is taken while its logits are there, so neither the logits nor their
    gradients are ever kept: the backward pass only scales what the forward pass found.
    """
    x = _blocks(x_BTD, 0)
    targets = _blocks(targets_BT, IGNORE)
    # What is differentiated beside x, an adapted head's factors say, has to be an argument.
    project, closed_over = jax.closure_convert(project, x[0])
    return _in_blocks(project, x, targets, *closed_over)


def _blocks(x: Array, fill: int) -> Array:
    """[B, T, ...] to [blocks, B, T / blocks, ...], filled up at the end.

    A block takes every n-th position, so that positions that are split stay where they are.
    """
    batch, length, *rest = x.shape
    missing = -length % BLOCKS
    x = jnp.pad(x, [(0, 0), (0, missing), *[(0, 0)] * len(rest)], constant_values=fill)
    return jnp.moveaxis(x.reshape(batch, -1, BLOCKS, *rest), 2, 0)


@partial(jax.custom_vjp, nondiff_argnums=(0,))
def _in_blocks(project: Project, x: Array, targets: Array, *closed_over: Array) -> Loss:
    def add(sums: Loss, block: tuple[Array, Array]) -> tuple[Loss, None]:
        loss = cross_entropy(project(block[0], *closed_over), block[1])
        return jax.tree.map(jnp.add, sums, loss), None

    return jax.lax.scan(add, _nothing(), (x, targets))[0]


def _forward(project: Project, x: Any, targets: Any, *closed_over: Any) -> tuple[Loss, Any]:
    trained = [i for i, value in enumerate(closed_over) if value.perturbed]
    values = [value.value for value in closed_over]

    def block_loss(x: Array, some: list[Array], targets: Array) -> Loss:
        arguments = list(values)
        for i, value in zip(trained, some, strict=True):
            arguments[i] = value
        return cross_entropy(project(x, *arguments), targets)

    def add(sums: Any, block: tuple[Array, Array]) -> tuple[Any, Array]:
        grad = jax.value_and_grad(block_loss, argnums=(0, 1), has_aux=True)
        loss, (dx, rest) = grad(block[0], [values[i] for i in trained], block[1])
        return jax.tree.map(jnp.add, sums, (loss, rest)), dx

    zeros = (_nothing(), [jnp.zeros_like(values[i]) for i in trained])
    (loss, rest), dx = jax.lax.scan(add, zeros, (x.value, targets.value))
    gradients = dict(zip(trained, rest, strict=True))
    return loss, (dx, [gradients.get(i) for i in range(len(values))])


def _backward(project: Project, saved: Any, cotangents: Any) -> tuple[Array | None, ...]:
    dx, rest = jax.tree.map(lambda g: g * cotangents[0].astype(g.dtype), saved)
    return dx, None, *rest


def _nothing() -> Loss:
    return jnp.zeros((), jnp.float32), jnp.zeros((), jnp.int32)


_in_blocks.defvjp(_forward, _backward, symbolic_zeros=True)
