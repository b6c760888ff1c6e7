"""Pure building blocks of a decoder: norm, positions, attention.

Letters: `B` batch, `T` query position, `S` key position, `N` query heads, `K` key/value heads,
`H` head width, `G` query heads per key head, `D` model width. Segment 0 is padding.
"""

from __future__ import annotations

from functools import partial

import jax
import jax.numpy as jnp
from jaxtyping import Array, Bool, Float, Int

QUERY_BLOCKS = 4  # of attention


def rms_norm(
    x: Float[Array, "... D"], scale_D: Float[Array, "D"], epsilon: float
) -> Float[Array, "... D"]:
    """Root-mean-square norm (arXiv 1910.07467), computed in float32, in the dtype of `x`."""
    x32 = x.astype(jnp.float32)
    inverse = jax.lax.rsqrt(jnp.mean(jnp.square(x32), axis=-1, keepdims=True) + epsilon)
    return (x32 * inverse).astype(x.dtype) * scale_D.astype(x.dtype)


def positions_in_segments(segment_ids_BT: Int[Array, "B T"]) -> Int[Array, "B T"]:
    """Positions that restart at 0 where the segment changes."""
    length = segment_ids_BT.shape[1]
    index_BT = jnp.broadcast_to(jnp.arange(length, dtype=jnp.int32), segment_ids_BT.shape)
    changed = segment_ids_BT[:, 1:] != segment_ids_BT[:, :-1]
    starts_BT = jnp.pad(jnp.where(changed, index_BT[:, 1:], 0), ((0, 0), (1, 0)))
    return index_BT - jax.lax.cummax(starts_BT, axis=1)


def attention(
    q_BTNH: Float[Array, "B T N H"],
    k_BSKH: Float[Array, "B S K H"],
    v_BSKH: Float[Array, "B S K H"],
    segment_ids_BT: Int[Array, "B T"] | None = None,
) -> Float[Array, "B T N H"]:
    """Causal softmax attention with grouped keys and values, scaled by H ** -0.5.

    A position sees earlier ones of its own segment only. The queries are taken in a few blocks,
    each with no more keys than it may see: three eighths of the work is never done, and the
    scores of only one block are needed at a time.
    """
    batch, length, heads, _ = q_BTNH.shape
    kv_heads = k_BSKH.shape[2]
    q_BTKGH = q_BTNH.reshape(batch, length, kv_heads, heads // kv_heads, -1)
    q_BKGTH = q_BTKGH.transpose(0, 2, 3, 1, 4)
    k_BKSH, v_BKSH = k_BSKH.swapaxes(1, 2), v_BSKH.swapaxes(1, 2)
    size = -(-length // QUERY_BLOCKS)
    blocks = []
    for start in range(0, length, size):
        stop = min(start + size, length)
        visible = jnp.tri(stop - start, stop, start, dtype=bool)
        if segment_ids_BT is not None:
            same = segment_ids_BT[:, start:stop, None] == segment_ids_BT[:, None, :stop]
            visible = (visible & same)[:, None, None]
        block = q_BKGTH[:, :, :, start:stop]
        blocks.append(_attend(block, k_BKSH[:, :, :stop], v_BKSH[:, :, :stop], visible))
    y_BKGTH = jnp.concatenate(blocks, axis=3)
    return y_BKGTH.transpose(0, 3, 1, 2, 4).reshape(q_BTNH.shape)


def _attend(
    q_BKGTH: Float[Array, "B K G T H"],
    k_BKSH: Float[Array, "B K S H"],
    v_BKSH: Float[Array, "B K S H"],
    visible: Bool[Array, "... T S"],
) -> Float[Array, "B K G T H"]:
    """Attention in float32 softmax; the G query heads of a key head are one matrix product."""
    batch, kv_heads, groups, queries, width = q_BKGTH.shape
    q_BKQH = q_BKGTH.reshape(batch, kv_heads, -1, width)
    scores = _einsum_f32("bkqh,bksh->bkqs", q_BKQH, k_BKSH)
    scores = scores.reshape(batch, kv_heads, groups, queries, -1) * width**-0.5
    scores = jnp.where(visible, scores, jnp.finfo(jnp.float32).min)
    weights = jnp.exp(scores - jax.lax.stop_gradient(jnp.max(scores, axis=-1, keepdims=True)))
    total = jnp.sum(weights, axis=-1, keepdims=True)
    weights = weights.astype(v_BKSH.dtype).reshape(*q_BKQH.shape[:3], -1)
    y_BKQH = _einsum_f32("bkqs,bksh->bkqh", weights, v_BKSH)
    # Divided after the product: [T, H] numbers, not [T, S].
    return (y_BKQH.reshape(q_BKGTH.shape) / total).astype(q_BKGTH.dtype)


def _einsum_f32(spec: str, x: Array, y: Array) -> Array:
    """An einsum with a float32 result, without float32 copies where the platform has such a one."""
    if x.dtype == jnp.float32:
        return jnp.einsum(spec, x, y)
    return jax.lax.platform_dependent(
        x,
        y,
        cpu=lambda x, y: jnp.einsum(spec, x.astype(jnp.float32), y.astype(jnp.float32)),
        default=lambda x, y: jnp.einsum(spec, x, y, preferred_element_type=jnp.float32),
    )


@partial(jax.checkpoint, prevent_cse=False)
def swiglu(gate: Float[Array, "*x F"], up: Float[Array, "*x F"]) -> Float[Array, "*x F"]:
    """`silu(gate) * up` (arXiv 2002.05202); its steps are cheaper to repeat than to save."""
    return jax.nn.silu(gate) * up


@partial(jax.custom_vjp, nondiff_argnums=(0,))
def product(spec: str, x: Array, factor: Array) -> Array:
    """`einsum(spec, x, factor)` in the dtype of `x`, with a gradient that is cheap for a factor.

    The sum over all rows takes the narrow operand first, since compilers transpose that one: [R]
    wide, not [I] or [O]. It is accumulated in float32.
    """
    return jnp.einsum(spec, x, factor.astype(x.dtype))


def _product_forward(spec: str, x: Array, factor: Array) -> tuple[Array, tuple[Array, Array]]:
    return product(spec, x, factor), (x, factor)


def _product_backward(spec: str, saved: tuple[Array, Array], dy: Array) -> tuple[Array, Array]:
    x, factor = saved
    operands, outputs = spec.split("->")
    inputs, kernel = operands.split(",")
    dx = jnp.einsum(f"{outputs},{kernel}->{inputs}", dy, factor.astype(dy.dtype))
    sides = [(inputs, x), (outputs, dy)]
    (narrow, first), (wide, second) = sorted(sides, key=lambda side: side[1].size)
    order = "".join(dict.fromkeys(c for c in narrow + wide if c in kernel))
    gradient = _einsum_f32(f"{narrow},{wide}->{order}", first, second).astype(factor.dtype)
    return dx, jnp.einsum(f"{order}->{kernel}", gradient)


product.defvjp(_product_forward, _product_backward)
