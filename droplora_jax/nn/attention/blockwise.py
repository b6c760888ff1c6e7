"""Causal attention whose backward pass keeps no scores (the algorithm of arXiv 2205.14135).

The queries are taken a portion at a time, each with a span of keys that holds all that it may see:
none behind it, and of a packed row or with a window not many before it. The backward pass finds the
weights again from what the forward pass saves of each query, the logarithm of its total.

Letters: `B` batch, `T` query position, `S` key position, `N` query heads, `K` key/value heads,
`H` head width, `G` query heads per key head.
"""

from __future__ import annotations

import functools
from typing import Any

import jax
import jax.numpy as jnp
from jax.ad_checkpoint import checkpoint_name
from jaxtyping import Array, Bool, Float, Int

from droplora_jax.core.einsum import einsum_f32
from droplora_jax.nn.attention.query_blocks import Layout, Portions

Saved = tuple[Any, ...]


@functools.partial(jax.custom_vjp, nondiff_argnums=(0,))
def blockwise_attention(
    layout: Layout,
    q_BTNH: Float[Array, "B T N H"],
    k_BSKH: Float[Array, "B S K H"],
    v_BSKH: Float[Array, "B S K H"],
    positions_T: Int[Array, "T"],
    segment_ids_BT: Int[Array, "B T"] | None,
    segment_ids_BS: Int[Array, "B S"] | None,
    window: Int[Array, ""] | None,
) -> Float[Array, "B T N H"]:
    """Attention of the queries at some ascending positions of a row, with the keys of all.

    A position sees earlier ones of its own segment only, and with a `window` itself and the
    `window - 1` before it. A segment is a run of positions.
    """
    seen = (positions_T, segment_ids_BT, segment_ids_BS, window)
    return _forward(layout, q_BTNH, k_BSKH, v_BSKH, *seen)[0]


def _forward(layout: Layout, q_BTNH: Array, k_BSKH: Array, v_BSKH: Array, *seen: Any):
    portions = Portions(layout, q_BTNH, k_BSKH, *seen)
    k, v = k_BSKH.swapaxes(1, 2), v_BSKH.swapaxes(1, 2)

    def with_keys(keys: int) -> Any:
        def attend_portion(nothing: None, q: Array, where: Any, place: Any) -> Any:
            own_k, own_v = (portions.part(x, where, keys) for x in (k, v))
            return nothing, attend(q, own_k, own_v, portions.visible(place, where, keys))

        return attend_portion

    _, (y, log_total) = portions.scan(with_keys, None, portions.split(q_BTNH))
    y_BTNH, log_total = checkpoint_name((portions.join(y), log_total), "attention")
    return y_BTNH, (q_BTNH, k_BSKH, v_BSKH, seen, y_BTNH, log_total)


def _backward(layout: Layout, saved: Saved, dy_BTNH: Array):
    q_BTNH, k_BSKH, v_BSKH, seen, y_BTNH, log_total = saved
    portions = Portions(layout, q_BTNH, k_BSKH, *seen)
    k, v = k_BSKH.swapaxes(1, 2), v_BSKH.swapaxes(1, 2)
    # What the softmax takes away from every gradient of a query's scores.
    mean_BTN1 = jnp.sum(_f32(dy_BTNH) * _f32(y_BTNH), axis=-1, keepdims=True)
    queries = (*map(portions.split, (q_BTNH, dy_BTNH, mean_BTN1)), log_total)

    def with_keys(keys: int) -> Any:
        def attend_portion(sums: Any, of_queries: Any, where: Any, place: Any) -> Any:
            own_k, own_v = (portions.part(x, where, keys) for x in (k, v))
            visible = portions.visible(place, where, keys)
            dq, *of_keys = _attend_backward(of_queries, own_k, own_v, visible)
            return tuple(map(functools.partial(portions.added, where), sums, of_keys)), dq

        return attend_portion

    zeros = jnp.zeros_like(k.swapaxes(2, 3), jnp.float32)
    sums, dq = portions.scan(with_keys, (zeros, zeros), queries)
    dk_BSKH, dv_BSKH = (jnp.moveaxis(x, 3, 1).astype(k.dtype) for x in sums)
    return portions.join(dq), dk_BSKH, dv_BSKH, None, None, None, None


blockwise_attention.defvjp(_forward, _backward)


def attend(
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
    of_queries: tuple[Array, Array, Array, Array],
    k_BKSH: Float[Array, "B K S H"],
    v_BKSH: Float[Array, "B K S H"],
    visible: Bool[Array, "... T S"],
) -> tuple[Float[Array, "B K G T H"], Float[Array, "B K H S"], Float[Array, "B K H S"]]:
    q_BKGTH, dy_BKGTH, mean, log_total = of_queries
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
    """The G query heads of a key head are one matrix product, in float32."""
    batch, kv_heads, groups, queries, _ = x_BKGTX.shape
    result = einsum_f32(spec, x_BKGTX.reshape(batch, kv_heads, groups * queries, -1), y)
    return result.reshape(batch, kv_heads, groups, queries, -1)


def _gradient(x_BKGTH: Array, weights: Array) -> Float[Array, "B K H S"]:
    """The narrow operand first, since compilers transpose that one."""
    batch, kv_heads, *_ = weights.shape
    x, weights = (a.reshape(batch, kv_heads, -1, a.shape[-1]) for a in (x_BKGTH, weights))
    return einsum_f32("bkqh,bkqs->bkhs", x, weights)


def _scale(q_BKGTH: Array) -> float:
    return q_BKGTH.shape[-1] ** -0.5


def _f32(x: Array) -> Float[Array, "..."]:
    return x.astype(jnp.float32)
