"""Causal attention whose backward pass keeps no scores (the algorithm of arXiv 2205.14135).

The queries are taken in a few blocks, each with no more keys than it may see: three eighths of
the work is never done, and the scores of only one block exist at a time. The backward pass finds
the weights again from what the forward pass saves of each query, the logarithm of its total.

Letters: `B` batch, `T` query position, `S` key position, `N` query heads, `K` key/value heads,
`H` head width, `G` query heads per key head.
"""

from __future__ import annotations

import functools
from collections.abc import Iterator, Sequence
from typing import Any

import jax
import jax.numpy as jnp
from jax.ad_checkpoint import checkpoint_name
from jaxtyping import Array, Bool, Float, Int

from droplora_jax.ops import einsum_f32

QUERY_BLOCKS = 4

Saved = tuple[Any, ...]


@jax.custom_vjp
def attention(
    q_BTNH: Float[Array, "B T N H"],
    k_BSKH: Float[Array, "B S K H"],
    v_BSKH: Float[Array, "B S K H"],
    segment_ids_BT: Int[Array, "B T"] | None = None,
    window: Int[Array, ""] | None = None,
) -> Float[Array, "B T N H"]:
    """Causal softmax attention with grouped keys and values, scaled by H ** -0.5.

    A position sees earlier ones of its own segment only, and with a `window` itself and the
    `window - 1` before it. The softmax is in float32, the result in the dtype of `q`. Under remat,
    a policy that saves the name `attention` runs it once.
    """
    return _forward(q_BTNH, k_BSKH, v_BSKH, segment_ids_BT, window)[0]


def _forward(
    q_BTNH: Array,
    k_BSKH: Array,
    v_BSKH: Array,
    segment_ids_BT: Array | None,
    window: Array | None,
):
    q, k, v = _by_key_head(q_BTNH, k_BSKH.shape[2]), k_BSKH.swapaxes(1, 2), v_BSKH.swapaxes(1, 2)
    blocks = [
        _attend(q[:, :, :, queries], k[:, :, keys], v[:, :, keys], visible)
        for queries, keys, visible in _blocks(q.shape[3], segment_ids_BT, window)
    ]
    y, log_total = (jnp.concatenate(parts, axis=3) for parts in zip(*blocks, strict=True))
    y, log_total = checkpoint_name((_by_position(y), log_total), "attention")
    return y, (q_BTNH, k_BSKH, v_BSKH, segment_ids_BT, window, y, log_total)


def _backward(saved: Saved, dy_BTNH: Array):
    q_BTNH, k_BSKH, v_BSKH, segment_ids_BT, window, y_BTNH, log_total = saved
    kv_heads = k_BSKH.shape[2]
    q, k, v = _by_key_head(q_BTNH, kv_heads), k_BSKH.swapaxes(1, 2), v_BSKH.swapaxes(1, 2)
    dy = _by_key_head(dy_BTNH, kv_heads)
    # What the softmax takes away from every gradient of a query's scores.
    mean_BTN = jnp.sum(_f32(dy_BTNH) * _f32(y_BTNH), axis=-1, keepdims=True)
    mean = _by_key_head(mean_BTN, kv_heads)
    blocks = [
        _attend_backward(
            q[:, :, :, queries],
            dy[:, :, :, queries],
            mean[:, :, :, queries],
            log_total[:, :, :, queries],
            k[:, :, keys],
            v[:, :, keys],
            visible,
        )
        for queries, keys, visible in _blocks(q.shape[3], segment_ids_BT, window)
    ]
    dq, dk, dv = zip(*blocks, strict=True)
    dq_BTNH = _by_position(jnp.concatenate(dq, axis=3))
    dk_BSKH, dv_BSKH = (_sum_over_blocks(x).swapaxes(1, 2).astype(k.dtype) for x in (dk, dv))
    return dq_BTNH, dk_BSKH, dv_BSKH, None, None


attention.defvjp(_forward, _backward)


def _attend(
    q_BKGTH: Float[Array, "B K G T H"],
    k_BKSH: Float[Array, "B K S H"],
    v_BKSH: Float[Array, "B K S H"],
    visible: Bool[Array, "... T S"],
) -> tuple[Float[Array, "B K G T H"], Float[Array, "B K G T 1"]]:
    """One block: the result, and the logarithm of the sum of the exponentials of its scores."""
    scores = _scores(q_BKGTH, k_BKSH, visible)
    highest = jnp.max(scores, axis=-1, keepdims=True)
    weights = jnp.exp(scores - highest)
    total = jnp.sum(weights, axis=-1, keepdims=True)
    # Divided after the product: [T, H] numbers, not [T, S].
    y_BKGTH = _product("bkqs,bksh->bkqh", weights.astype(v_BKSH.dtype), v_BKSH) / total
    return y_BKGTH.astype(q_BKGTH.dtype), highest + jnp.log(total)


def _attend_backward(
    q_BKGTH: Float[Array, "B K G T H"],
    dy_BKGTH: Float[Array, "B K G T H"],
    mean: Float[Array, "B K G T 1"],
    log_total: Float[Array, "B K G T 1"],
    k_BKSH: Float[Array, "B K S H"],
    v_BKSH: Float[Array, "B K S H"],
    visible: Bool[Array, "... T S"],
) -> tuple[Float[Array, "B K G T H"], Float[Array, "B K S H"], Float[Array, "B K S H"]]:
    weights = jnp.exp(_scores(q_BKGTH, k_BKSH, visible) - log_total)
    dweights = _product("bkqh,bksh->bkqs", dy_BKGTH, v_BKSH)
    dscores = (weights * (dweights - mean) * _scale(q_BKGTH)).astype(q_BKGTH.dtype)
    dq_BKGTH = _product("bkqs,bksh->bkqh", dscores, k_BKSH).astype(q_BKGTH.dtype)
    dk_BKSH = _gradient(dscores, q_BKGTH)
    dv_BKSH = _gradient(weights.astype(dy_BKGTH.dtype), dy_BKGTH)
    return dq_BKGTH, dk_BKSH, dv_BKSH


def _scores(q_BKGTH: Array, k_BKSH: Array, visible: Array) -> Float[Array, "B K G T S"]:
    scores = _product("bkqh,bksh->bkqs", q_BKGTH, k_BKSH) * _scale(q_BKGTH)
    return jnp.where(visible, scores, jnp.finfo(jnp.float32).min)


def _product(spec: str, x_BKGTX: Array, y: Array) -> Array:
    """The G query heads of a key head are one matrix product, in float32."""
    batch, kv_heads, groups, queries, _ = x_BKGTX.shape
    result = einsum_f32(spec, x_BKGTX.reshape(batch, kv_heads, groups * queries, -1), y)
    return result.reshape(batch, kv_heads, groups, queries, -1)


def _gradient(weights: Array, x_BKGTH: Array) -> Float[Array, "B K S H"]:
    batch, kv_heads, *_ = weights.shape
    weights, x = (a.reshape(batch, kv_heads, -1, a.shape[-1]) for a in (weights, x_BKGTH))
    return einsum_f32("bkqs,bkqh->bksh", weights, x)


def _sum_over_blocks(parts: Sequence[Array]) -> Float[Array, "B K S H"]:
    """Blocks of queries see more and more keys: the gradients of the first keys are in all."""
    length = parts[-1].shape[2]
    padded = (jnp.pad(x, ((0, 0), (0, 0), (0, length - x.shape[2]), (0, 0))) for x in parts)
    return functools.reduce(jnp.add, padded)


def _blocks(
    length: int, segment_ids_BT: Array | None, window: Array | None
) -> Iterator[tuple[slice, slice, Array]]:
    """Every block of queries with the keys that it may see, and which sees which."""
    size = -(-length // QUERY_BLOCKS)
    for start in range(0, length, size):
        stop = min(start + size, length)
        visible = jnp.tri(stop - start, stop, start, dtype=bool)
        if window is not None:
            distance = jnp.arange(start, stop)[:, None] - jnp.arange(stop)
            visible = visible & (distance < window)
        if segment_ids_BT is not None:
            same = segment_ids_BT[:, start:stop, None] == segment_ids_BT[:, None, :stop]
            visible = (visible & same)[:, None, None]
        yield slice(start, stop), slice(0, stop), visible


def _by_key_head(x_BTNH: Array, kv_heads: int) -> Float[Array, "B K G T H"]:
    batch, length, _, width = x_BTNH.shape
    return x_BTNH.reshape(batch, length, kv_heads, -1, width).transpose(0, 2, 3, 1, 4)


def _by_position(x_BKGTH: Array) -> Float[Array, "B T N H"]:
    batch, _, _, length, width = x_BKGTH.shape
    return x_BKGTH.transpose(0, 3, 1, 2, 4).reshape(batch, length, -1, width)


def _scale(q_BKGTH: Array) -> float:
    return q_BKGTH.shape[-1] ** -0.5


def _f32(x: Array) -> Float[Array, "..."]:
    return x.astype(jnp.float32)
