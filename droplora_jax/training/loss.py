"""Cross-entropy of next tokens, without the logits of a whole batch.

Letters: `B` batch, `T` position, `D` model width, `V` vocabulary; `G` groups of rows, each on
devices of its own, and `N` the positions of a group.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from functools import partial
from typing import Any, TypeVar

import jax
import jax.numpy as jnp
from jax.sharding import Mesh
from jaxtyping import Array, Float, Int

from droplora_jax.core.sharding import RULES, axis_size
from droplora_jax.data.batch import IGNORE

BLOCKS = 8  # blocks of positions; the logits of one block exist at a time

Result = TypeVar("Result")
# From hidden states [B, T, D] and the arrays that `jax.closure_convert` took out of the closure, to
# logits [B, T, V].
Project = Callable[..., Array]
Loss = tuple[Float[Array, ""], Int[Array, ""]]


def cross_entropy(logits_BTV: Float[Array, "B T V"], targets_BT: Int[Array, "B T"]) -> Loss:
    """Summed negative log-likelihood of the targets in float32, and how many there are.

    Targets equal to `IGNORE` have no loss.
    """
    logits = logits_BTV.astype(jnp.float32)
    labelled = targets_BT != IGNORE
    index = jnp.where(labelled, targets_BT, 0)[..., None]
    target_logits = jnp.take_along_axis(logits, index, axis=-1)[..., 0]
    losses = jax.nn.logsumexp(logits, axis=-1) - target_logits
    return jnp.sum(losses, where=labelled), jnp.sum(labelled, dtype=jnp.int32)


@jax.named_scope("loss")
def projected_cross_entropy(
    project: Callable[[Float[Array, "B T D"]], Float[Array, "B T V"]],
    x_BTD: Float[Array, "B T D"],
    targets_BT: Int[Array, "B T"],
    *,
    mesh: Mesh | None = None,
) -> Loss:
    """`cross_entropy(project(x), targets)`, one block of positions at a time.

    Positions with a target are gathered into the first blocks, and a block without any is not
    projected. The gradient of a block is computed while its logits exist, so neither the logits
    nor their gradients are kept: the backward pass only scales what the forward pass computed.

    Args:
      project: hidden states of any positions to their logits.
      mesh: the mesh that x is on. Positions are reordered only within a device's own rows; where
        positions themselves are split (`context`), they are not reordered.
    """
    groups = _groups(mesh, len(targets_BT))
    if groups is None:
        x, targets = _every_nth(x_BTD, 0), _every_nth(targets_BT, IGNORE)
    else:
        x_GND = x_BTD.reshape(groups, -1, x_BTD.shape[-1])
        targets_GN = targets_BT.reshape(groups, -1)
        order_GN = jnp.argsort(targets_GN == IGNORE, axis=1, stable=True)
        x = _consecutive(_reordered(x_GND, order_GN), 0)
        targets = _consecutive(_taken(targets_GN, order_GN), IGNORE)
    # custom_vjp cannot differentiate through a closure, so the arrays that `project` closes over
    # (an adapted head's factors, for example) become arguments.
    project, closed_over = jax.closure_convert(project, x[0])
    return _in_blocks(project, x, targets, *closed_over)


def _groups(mesh: Mesh | None, rows: int) -> int | None:
    """Into how many parts the mesh splits the rows; None if it splits positions too."""
    if mesh is None:
        return 1
    if mesh.shape["context"] > 1:
        return None
    return math.gcd(rows, axis_size(mesh, RULES["batch"] or ()))


def _taken(x: Array, order_GN: Array) -> Array:
    index = order_GN.reshape(*order_GN.shape, *[1] * (x.ndim - 2))
    return jnp.take_along_axis(x, index, axis=1, mode="promise_in_bounds")


@jax.custom_vjp
def _reordered(x_GND: Array, order_GN: Array) -> Array:
    """The positions of every group in the given order."""
    return _taken(x_GND, order_GN)


def _reordered_forward(x_GND: Array, order_GN: Array) -> tuple[Array, Array]:
    return _taken(x_GND, order_GN), order_GN


def _reordered_backward(order_GN: Array, dy_GND: Array) -> tuple[Array, None]:
    # The order is a permutation, so the gradient is a gather too and needs no sums.
    return _taken(dy_GND, jnp.argsort(order_GN, axis=1)), None


_reordered.defvjp(_reordered_forward, _reordered_backward)


def _consecutive(x: Array, fill: int) -> Array:
    """[G, N, ...] to [blocks, G, N / blocks, ...] of consecutive positions, padded at the end."""
    x = _padded(x, fill)
    return jnp.moveaxis(x.reshape(len(x), BLOCKS, -1, *x.shape[2:]), 1, 0)


def _every_nth(x: Array, fill: int) -> Array:
    """[B, T, ...] to [blocks, B, T / blocks, ...], so that split positions stay on their device."""
    x = _padded(x, fill)
    return jnp.moveaxis(x.reshape(len(x), -1, BLOCKS, *x.shape[2:]), 2, 0)


def _padded(x: Array, fill: int) -> Array:
    missing = [(0, 0), (0, -x.shape[1] % BLOCKS), *[(0, 0)] * (x.ndim - 2)]
    return jnp.pad(x, missing, constant_values=fill)


def _if_labelled(
    block_loss: Callable[..., Result], x: Array, targets: Array, *rest: list[Array]
) -> Result:
    """`block_loss` of a block, or zeros if it has no target."""

    def zeros(*arguments: Array | list[Array]) -> Result:
        shapes = jax.eval_shape(block_loss, *arguments)
        return jax.tree.map(lambda like: jnp.zeros(like.shape, like.dtype), shapes)

    return jax.lax.cond(jnp.any(targets != IGNORE), block_loss, zeros, x, targets, *rest)


@partial(jax.custom_vjp, nondiff_argnums=(0,))
def _in_blocks(project: Project, x: Array, targets: Array, *closed_over: Array) -> Loss:
    def add(sums: Loss, block: tuple[Array, Array]) -> tuple[Loss, None]:
        loss = _if_labelled(lambda x, t: cross_entropy(project(x, *closed_over), t), *block)
        return jax.tree.map(jnp.add, sums, loss), None

    return jax.lax.scan(add, _zero_loss(), (x, targets))[0]


def _forward(project: Project, x: Any, targets: Any, *closed_over: Any) -> tuple[Loss, Any]:
    trained = [i for i, value in enumerate(closed_over) if value.perturbed]
    values = [value.value for value in closed_over]

    def block_loss(x: Array, targets: Array, trained_values: list[Array]) -> Loss:
        arguments = list(values)
        for i, value in zip(trained, trained_values, strict=True):
            arguments[i] = value
        return cross_entropy(project(x, *arguments), targets)

    def add(sums: Any, block: tuple[Array, Array]) -> tuple[Any, Array]:
        grad = jax.value_and_grad(block_loss, argnums=(0, 2), has_aux=True)
        loss, (dx, rest) = _if_labelled(grad, *block, [values[i] for i in trained])
        return jax.tree.map(jnp.add, sums, (loss, rest)), dx

    zeros = (_zero_loss(), [jnp.zeros_like(values[i]) for i in trained])
    (loss, rest), dx = jax.lax.scan(add, zeros, (x.value, targets.value))
    gradients = dict(zip(trained, rest, strict=True))
    return loss, (dx, [gradients.get(i) for i in range(len(values))])


def _backward(
    project: Project,
    gradients: Any,
    cotangents: tuple[Array, object],  # no gradient of a count
) -> tuple[Array | None, ...]:
    dx, rest = jax.tree.map(lambda g: g * cotangents[0].astype(g.dtype), gradients)
    return dx, None, *rest


def _zero_loss() -> Loss:
    return jnp.zeros((), jnp.float32), jnp.zeros((), jnp.int32)


_in_blocks.defvjp(_forward, _backward, symbolic_zeros=True)
