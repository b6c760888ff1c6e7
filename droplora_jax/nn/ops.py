"""Pure building blocks of a decoder: norm, positions, products.

Letters: `B` batch, `T` position, `D` model width, `F` feed-forward width.
"""

from __future__ import annotations

from functools import partial

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float, Int

from droplora_jax.core.einsum import product


def rms_norm(
    x: Float[Array, "... D"], scale_D: Float[Array, "D"], epsilon: float
) -> Float[Array, "... D"]:
    """Root-mean-square norm (arXiv 1910.07467), computed in float32, in the dtype of `x`."""
    x32 = x.astype(jnp.float32)
    inverse = jax.lax.rsqrt(jnp.mean(jnp.square(x32), axis=-1, keepdims=True) + epsilon)
    return times((x32 * inverse).astype(x.dtype), scale_D)


def positions_in_segments(segment_ids_BT: Int[Array, "B T"]) -> Int[Array, "B T"]:
    """Positions that restart at 0 where the segment changes."""
    length = segment_ids_BT.shape[1]
    index_BT = jnp.broadcast_to(jnp.arange(length, dtype=jnp.int32), segment_ids_BT.shape)
    changed = segment_ids_BT[:, 1:] != segment_ids_BT[:, :-1]
    starts_BT = jnp.pad(jnp.where(changed, index_BT[:, 1:], 0), ((0, 0), (1, 0)))
    return index_BT - jax.lax.cummax(starts_BT, axis=1)


def lengths_of_segments(segment_ids_BT: Int[Array, "B T"]) -> Int[Array, "B T"]:
    """For each position, the length of its segment."""
    after_BT = jnp.flip(positions_in_segments(jnp.flip(segment_ids_BT, axis=1)), axis=1)
    return positions_in_segments(segment_ids_BT) + after_BT + 1


@partial(jax.checkpoint, prevent_cse=False)
def swiglu(gate: Float[Array, "*x F"], up: Float[Array, "*x F"]) -> Float[Array, "*x F"]:
    """`silu(gate) * up` (arXiv 2002.05202), recomputed in the backward pass instead of saved."""
    return jax.nn.silu(gate) * up


# Trained parameters are float32, while activations may be narrower. For use, parameters are cast to
# the dtype of the activations; their gradients, sums over positions, are summed in float32.


def matmul(x: Float[Array, "... I"], kernel_IO: Float[Array, "I O"]) -> Float[Array, "... O"]:
    """`x @ kernel` in the dtype of `x`; a wider kernel's gradient is summed in its dtype."""
    if kernel_IO.dtype == x.dtype:
        return x @ kernel_IO
    return product("...i,io->...o", x, kernel_IO)


def times(x: Float[Array, "..."], gain: Float[Array, "..."]) -> Float[Array, "..."]:
    """`x * gain` in the dtype and shape of `x`; a wider gain's gradient is summed in its dtype.

    `gain` broadcasts against `x`.
    """
    return x * gain if gain.dtype == x.dtype else _times(x, gain)


def plus(x: Float[Array, "..."], bias: Float[Array, "..."]) -> Float[Array, "..."]:
    """`x + bias` in the dtype and shape of `x`; a wider bias's gradient is summed in its dtype.

    `bias` broadcasts against `x`.
    """
    return x + bias if bias.dtype == x.dtype else _plus(x, bias)


@jax.custom_vjp
def _times(x: Array, gain: Array) -> Array:
    return x * gain.astype(x.dtype)


def _times_forward(x: Array, gain: Array) -> tuple[Array, tuple[Array, Array]]:
    return _times(x, gain), (x, gain)


def _times_backward(saved: tuple[Array, Array], dy: Array) -> tuple[Array, Array]:
    x, gain = saved
    dx = dy * gain.astype(dy.dtype)
    return dx, _summed_as(gain, x.astype(gain.dtype) * dy.astype(gain.dtype))


_times.defvjp(_times_forward, _times_backward)


@jax.custom_vjp
def _plus(x: Array, bias: Array) -> Array:
    return x + bias.astype(x.dtype)


def _plus_forward(x: Array, bias: Array) -> tuple[Array, Array]:
    return _plus(x, bias), bias


def _plus_backward(bias: Array, dy: Array) -> tuple[Array, Array]:
    return dy, _summed_as(bias, dy.astype(bias.dtype))


_plus.defvjp(_plus_forward, _plus_backward)


def _summed_as(like: Array, x: Array) -> Array:
    """The sum of `x` over the axes along which `like` was broadcast."""
    leading = x.ndim - like.ndim
    sizes = (1,) * leading + like.shape
    axes = [i for i, size in enumerate(sizes) if i < leading or size != x.shape[i]]
    return jnp.sum(x, axis=axes).reshape(like.shape)
