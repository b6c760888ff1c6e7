"""Causal attention whose backward pass keeps no scores (the algorithm of arXiv 2205.14135).

The queries are taken in a few blocks, each with no more keys than it may see: three eighths of
the work is never done, and the scores of only a portion of a block exist at a time. The backward
pass finds the weights again from what the forward pass saves of each query, the logarithm of its
total.

Letters: `B` batch, `T` query position, `S` key position, `N` query heads, `K` key/value heads,
`H` head width, `G` query heads per key head.
"""

from __future__ import annotations

import functools
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import jax
import jax.numpy as jnp
from jax.ad_checkpoint import checkpoint_name
from jaxtyping import Array, Bool, Float, Int

from droplora_jax.ops import einsum_f32

QUERY_BLOCKS = 4
SCORES = 2**23  # of a portion on one device, unless that left the matrix units too few rows
ROWS = 128  # which is so many

Saved = tuple[Any, ...]


@dataclass(frozen=True)
class Layout:
    """Where the queries and keys of a row are.

    Attributes:
      devices: that share batch and heads.
      runs: of consecutive positions that the queries are. With more than one, as many runs make
        the row, and the queries are the same part of each.
    """

    devices: int = 1
    runs: int = 1

    def keys(self, end: int, queries: int, keys: int) -> int:
        """How many keys the queries before the `end`-th see at most."""
        if self.runs == 1:
            return min(end, keys)
        return min(-(-end * self.runs // queries) * (keys // self.runs), keys)

    def portions(self, block: int, batch: int, heads: int, groups: int, keys: int) -> int:
        """In how many portions the scores of a block of queries with all keys are taken."""
        rows = max(SCORES * self.devices // (batch * heads * keys), -(-ROWS // groups))
        return -(-block // rows)


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
    `window - 1` before it.
    """
    seen = (positions_T, segment_ids_BT, segment_ids_BS, window)
    return _forward(layout, q_BTNH, k_BSKH, v_BSKH, *seen)[0]


def _forward(layout: Layout, q_BTNH: Array, k_BSKH: Array, v_BSKH: Array, *seen: Any):
    blocks = _Blocks(layout, q_BTNH, k_BSKH, *seen)
    k, v = k_BSKH.swapaxes(1, 2), v_BSKH.swapaxes(1, 2)

    def of_block(keys: int, q: Array, place: Any) -> Any:
        def attend_portion(portion: Any) -> Any:
            q, place = _tied(portion)
            return attend(q, k[:, :, :keys], v[:, :, :keys], blocks.visible(place, keys))

        return jax.lax.map(attend_portion, (q, place))

    done = [of_block(keys, q, place) for keys, q, place in blocks.of(blocks.split(q_BTNH))]
    y, log_total = (jnp.stack(parts) for parts in zip(*done, strict=True))
    y_BTNH, log_total = checkpoint_name((blocks.join(y), log_total), "attention")
    return y_BTNH, (q_BTNH, k_BSKH, v_BSKH, seen, y_BTNH, log_total)


def _backward(layout: Layout, saved: Saved, dy_BTNH: Array):
    q_BTNH, k_BSKH, v_BSKH, seen, y_BTNH, log_total = saved
    blocks = _Blocks(layout, q_BTNH, k_BSKH, *seen)
    k, v = k_BSKH.swapaxes(1, 2), v_BSKH.swapaxes(1, 2)
    # What the softmax takes away from every gradient of a query's scores.
    mean_BTN1 = jnp.sum(_f32(dy_BTNH) * _f32(y_BTNH), axis=-1, keepdims=True)
    queries = (*map(blocks.split, (q_BTNH, dy_BTNH, mean_BTN1)), log_total)

    def of_block(keys: int, of_queries: Any, place: Any) -> Any:
        def attend_portion(sums: Any, portion: Any) -> Any:
            (q, dy, mean, log_total), place = _tied(portion)
            visible = blocks.visible(place, keys)
            dq, dk, dv = _attend_backward(
                q, dy, mean, log_total, k[:, :, :keys], v[:, :, :keys], visible
            )
            return jax.tree.map(jnp.add, sums, (dk, dv)), dq

        zeros = jnp.zeros_like(k[:, :, :keys].swapaxes(2, 3), jnp.float32)
        return jax.lax.scan(attend_portion, (zeros, zeros), (of_queries, place))

    done = [of_block(keys, of_queries, place) for keys, of_queries, place in blocks.of(queries)]
    sums, dq = zip(*done, strict=True)
    dk, dv = (_sum_over_blocks(parts) for parts in zip(*sums, strict=True))
    dk_BSKH, dv_BSKH = (jnp.moveaxis(x, 3, 1).astype(k.dtype) for x in (dk, dv))
    return blocks.join(jnp.stack(dq)), dk_BSKH, dv_BSKH, None, None, None, None


blockwise_attention.defvjp(_forward, _backward)


class _Blocks:
    """The queries as [blocks, portions, B, K, G, rows, ...], the last ones repeated."""

    def __init__(
        self,
        layout: Layout,
        q_BTNH: Array,
        k_BSKH: Array,
        positions_T: Array,
        segment_ids_BT: Array | None,
        segment_ids_BS: Array | None,
        window: Array | None,
    ) -> None:
        batch, self.length, heads, _ = q_BTNH.shape
        _, self.keys, self.kv_heads, _ = k_BSKH.shape
        self.layout, self.window, self.segment_ids_BS = layout, window, segment_ids_BS
        self.blocks = min(QUERY_BLOCKS, self.length)
        block = -(-self.length // self.blocks)
        groups = heads // self.kv_heads
        self.portions = layout.portions(block, batch, heads, groups, self.keys)
        self.rows = -(-block // self.portions)
        places = [positions_T[None], *([] if segment_ids_BT is None else [segment_ids_BT])]
        # A query that only fills up sees what the last one does, and no gradient comes to it.
        self.places = [self._split(x, mode="edge") for x in places]

    def _split(self, x: Array, **pad: Any) -> Array:
        """[B, T, ...] to [blocks, portions, B, rows, ...]."""
        missing = self.blocks * self.portions * self.rows - self.length
        x = jnp.pad(x, [(0, 0), (0, missing), *[(0, 0)] * (x.ndim - 2)], **pad)
        x = x.reshape(x.shape[0], self.blocks, self.portions, self.rows, *x.shape[2:])
        return jnp.moveaxis(x, 0, 2)

    def split(self, x_BTNX: Array) -> Float[Array, "blocks portions B K G rows X"]:
        batch, length, _, width = x_BTNX.shape
        grouped = x_BTNX.reshape(batch, length, self.kv_heads, -1, width)
        return jnp.moveaxis(self._split(grouped), 3, 5)

    def join(self, x: Float[Array, "blocks portions B K G rows X"]) -> Float[Array, "B T N X"]:
        x = jnp.moveaxis(jnp.moveaxis(x, 5, 3), 2, 0)
        return x.reshape(x.shape[0], -1, x.shape[-3] * x.shape[-2], x.shape[-1])[:, : self.length]

    def of(self, of_queries: Any) -> list[tuple[int, Any, Any]]:
        """Of every block: how many keys it sees, its queries, and where they are."""
        ends = [(b + 1) * self.portions * self.rows for b in range(self.blocks)]
        return [
            (
                self.layout.keys(min(end, self.length), self.length, self.keys),
                *jax.tree.map(lambda x, b=b: x[b], (of_queries, self.places)),
            )
            for b, end in enumerate(ends)
        ]

    def visible(self, place: Sequence[Array], keys: int) -> Bool[Array, "... T S"]:
        """Which of the first `keys` keys the queries of a portion see."""
        positions_T, key_S = place[0][0], jnp.arange(keys, dtype=jnp.int32)
        distance = positions_T[:, None] - key_S
        visible = distance >= 0
        if self.window is not None:
            visible = visible & (distance < self.window)
        if self.segment_ids_BS is None:
            return visible
        same = place[1][:, :, None] == self.segment_ids_BS[:, None, :keys]
        return (visible & same)[:, None, None]


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
    q_BKGTH: Float[Array, "B K G T H"],
    dy_BKGTH: Float[Array, "B K G T H"],
    mean: Float[Array, "B K G T 1"],
    log_total: Float[Array, "B K G T 1"],
    k_BKSH: Float[Array, "B K S H"],
    v_BKSH: Float[Array, "B K S H"],
    visible: Bool[Array, "... T S"],
) -> tuple[Float[Array, "B K G T H"], Float[Array, "B K H S"], Float[Array, "B K H S"]]:
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


def _tied(portion: Any) -> Any:
    """Else the compiler finds that what a query sees is the same in every layer, and keeps it."""
    return jax.lax.optimization_barrier(portion)


def _sum_over_blocks(parts: Sequence[Array]) -> Float[Array, "B K H S"]:
    """Blocks of queries see more and more keys: the gradients of the first keys are in all."""
    length = parts[-1].shape[3]
    padded = (jnp.pad(x, ((0, 0), (0, 0), (0, 0), (0, length - x.shape[3]))) for x in parts)
    return functools.reduce(jnp.add, padded)


def _scale(q_BKGTH: Array) -> float:
    return q_BKGTH.shape[-1] ** -0.5


def _f32(x: Array) -> Float[Array, "..."]:
    return x.astype(jnp.float32)
