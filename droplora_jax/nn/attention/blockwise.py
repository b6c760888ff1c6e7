"""Causal attention whose backward pass keeps no scores (the algorithm of arXiv 2205.14135).

The queries are taken a block at a time, each with a span of keys that holds all that it may see:
none after it, and in a packed row or with a window not many before it. The backward pass computes
the weights again from the logarithm of each query's sum of exponentials, which the forward pass
saves.

Letters: `B` batch, `T` query position, `S` key position, `N` query heads, `K` key/value heads,
`H` head width, `G` query heads per key head.
"""

from __future__ import annotations

import functools

import jax
import jax.numpy as jnp
from jax.ad_checkpoint import checkpoint_name
from jaxtyping import Array, Bool, Float

from droplora_jax.core.einsum import einsum_f32
from droplora_jax.nn.attention.query_blocks import Block, Body, Layout, QueryBlocks, Visibility

# q, k, v, what decides which keys a query sees, the result, and the log of each softmax's sum.
Residuals = tuple[Array, Array, Array, Visibility, Array, Array]
# Per block: q, dy, and for each query sum(dy * y) and the log-sum-exp of its scores.
QueryGradients = tuple[Array, Array, Array, Array]


@functools.partial(jax.custom_vjp, nondiff_argnums=(0,))
def blockwise_attention(
    layout: Layout,
    q_BTNH: Float[Array, "B T N H"],
    k_BSKH: Float[Array, "B S K H"],
    v_BSKH: Float[Array, "B S K H"],
    seen: Visibility,
) -> Float[Array, "B T N H"]:
    """Attention of the queries at some ascending positions of a row to the keys of all positions.

    See `AttentionInputs` for segments and windows; here queries and keys have segment ids of
    their own, since the queries may be those of a part of the row.
    """
    return _forward(layout, q_BTNH, k_BSKH, v_BSKH, seen)[0]


def _forward(
    layout: Layout, q_BTNH: Array, k_BSKH: Array, v_BSKH: Array, seen: Visibility
) -> tuple[Array, Residuals]:
    blocks = QueryBlocks(layout, q_BTNH, k_BSKH, seen)
    k, v = k_BSKH.swapaxes(1, 2), v_BSKH.swapaxes(1, 2)

    def body_for(span: int) -> Body[None, Array, tuple[Array, Array]]:
        def attend_block(carry: None, q: Array, block: Block) -> tuple[None, tuple[Array, Array]]:
            block_k, block_v = (blocks.keys_of(block, x, span) for x in (k, v))
            return carry, attend(q, block_k, block_v, blocks.visible(block, span))

        return attend_block

    _, (y, log_total) = blocks.scan(body_for, None, blocks.split(q_BTNH))
    y_BTNH, log_total = checkpoint_name((blocks.join(y), log_total), "attention")
    return y_BTNH, (q_BTNH, k_BSKH, v_BSKH, seen, y_BTNH, log_total)


def _backward(
    layout: Layout, residuals: Residuals, dy_BTNH: Array
) -> tuple[Array, Array, Array, None]:
    q_BTNH, k_BSKH, v_BSKH, seen, y_BTNH, log_total = residuals
    blocks = QueryBlocks(layout, q_BTNH, k_BSKH, seen)
    k, v = k_BSKH.swapaxes(1, 2), v_BSKH.swapaxes(1, 2)
    # sum(dy * y), the term that the softmax's gradient subtracts.
    mean_BTN1 = jnp.sum(_f32(dy_BTNH) * _f32(y_BTNH), axis=-1, keepdims=True)
    q, dy, mean = (blocks.split(x) for x in (q_BTNH, dy_BTNH, mean_BTN1))

    def body_for(span: int) -> Body[tuple[Array, Array], QueryGradients, Array]:
        def attend_block(
            sums: tuple[Array, Array], block_queries: QueryGradients, block: Block
        ) -> tuple[tuple[Array, Array], Array]:
            block_k, block_v = (blocks.keys_of(block, x, span) for x in (k, v))
            visible = blocks.visible(block, span)
            dq, dk, dv = _attend_backward(block_queries, block_k, block_v, visible)
            return (blocks.add(block, sums[0], dk), blocks.add(block, sums[1], dv)), dq

        return attend_block

    zeros = jnp.zeros_like(k.swapaxes(2, 3), jnp.float32)
    sums, dq = blocks.scan(body_for, (zeros, zeros), (q, dy, mean, log_total))
    dk_BSKH, dv_BSKH = (jnp.moveaxis(x, 3, 1).astype(k.dtype) for x in sums)
    return blocks.join(dq), dk_BSKH, dv_BSKH, None


blockwise_attention.defvjp(_forward, _backward)


def attend(
    q_BKGTH: Float[Array, "B K G T H"],
    k_BKSH: Float[Array, "B K S H"],
    v_BKSH: Float[Array, "B K S H"],
    visible: Bool[Array, "... T S"],
) -> tuple[Float[Array, "B K G T H"], Float[Array, "B K G T 1"]]:
    """Attention of one block: the result, and the log of the sum of its scores' exponentials."""
    scores = _scores(q_BKGTH, k_BKSH, visible)
    highest = jnp.max(scores, axis=-1, keepdims=True)
    weights = jnp.exp(scores - highest)
    total = jnp.sum(weights, axis=-1, keepdims=True)
    # Divided after the product, when there are [T, H] numbers instead of [T, S].
    y_BKGTH = _product("bkqs,bksh->bkqh", weights.astype(v_BKSH.dtype), v_BKSH) / total
    return y_BKGTH.astype(q_BKGTH.dtype), highest + jnp.log(total)


def _attend_backward(
    queries: QueryGradients,
    k_BKSH: Float[Array, "B K S H"],
    v_BKSH: Float[Array, "B K S H"],
    visible: Bool[Array, "... T S"],
) -> tuple[Float[Array, "B K G T H"], Float[Array, "B K H S"], Float[Array, "B K H S"]]:
    q_BKGTH, dy_BKGTH, mean, log_total = queries
    weights = jnp.exp(_scores(q_BKGTH, k_BKSH, visible) - log_total)
    dweights = _product("bkqh,bksh->bkqs", dy_BKGTH, v_BKSH)
    dscores = (weights * (dweights - mean) * _scale(q_BKGTH)).astype(q_BKGTH.dtype)
    dq_BKGTH = _product("bkqs,bksh->bkqh", dscores, k_BKSH).astype(q_BKGTH.dtype)
    dk_BKHS = _gradient(q_BKGTH, dscores)
    dv_BKHS = _gradient(dy_BKGTH, weights.astype(dy_BKGTH.dtype))
    return dq_BKGTH, dk_BKHS, dv_BKHS


def _scores(q_BKGTH: Array, k_BKSH: Array, visible: Array) -> Float[Array, "B K G T S"]:
    scores = _product("bkqh,bksh->bkqs", q_BKGTH, k_BKSH) * _scale(q_BKGTH)
    return jnp.where(visible, scores, jnp.finfo(jnp.float32).min)


def _product(spec: str, x_BKGTX: Array, y: Array) -> Array:
    """A product in float32; the G query heads that share a key head are rows of one matrix."""
    batch, kv_heads, groups, queries, _ = x_BKGTX.shape
    result = einsum_f32(spec, x_BKGTX.reshape(batch, kv_heads, groups * queries, -1), y)
    return result.reshape(batch, kv_heads, groups, queries, -1)


def _gradient(x_BKGTH: Array, weights: Array) -> Float[Array, "B K H S"]:
    """A gradient of keys or values; the narrow operand comes first, as compilers transpose it."""
    batch, kv_heads, *_ = weights.shape
    x, weights = (a.reshape(batch, kv_heads, -1, a.shape[-1]) for a in (x_BKGTH, weights))
    return einsum_f32("bkqh,bkqs->bkhs", x, weights)


def _scale(q_BKGTH: Array) -> float:
    return q_BKGTH.shape[-1] ** -0.5


def _f32(x: Array) -> Float[Array, "..."]:
    return x.astype(jnp.float32)
