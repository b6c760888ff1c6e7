"""Causal attention whose backward pass keeps no scores (the algorithm of arXiv 2205.14135).

The queries are taken a portion at a time, each with a span of keys that holds all that it may see:
none behind it, and of a packed row or with a window not many before it. The backward pass finds the
weights again from what the forward pass saves of each query, the logarithm of its total.

Letters: `B` batch, `T` query position, `S` key position, `N` query heads, `K` key/value heads,
`H` head width, `G` query heads per key head, `P` portion.
"""

from __future__ import annotations

import functools
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax.ad_checkpoint import checkpoint_name
from jaxtyping import Array, Bool, Float, Int

from droplora_jax.ops import einsum_f32

SPANS = 8  # lengths that a span of keys may have, and portions at least
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
      apart: every long row of the batch by itself, with no more keys than it needs: on one
        device that has enough to do with a part of a row.
    """

    devices: int = 1
    runs: int = 1
    apart: bool = False

    def keys(self, end: int, queries: int, keys: int) -> int:
        """How many keys the queries before the `end`-th see at most."""
        if self.runs == 1:
            return min(end, keys)
        return min(-(-end * self.runs // queries) * (keys // self.runs), keys)

    def rows(self, length: int, batch: int, heads: int, groups: int, keys: int) -> int:
        """How many queries of a row a portion has."""
        few = -(-ROWS // groups)
        many = max(self.devices * SCORES // (batch * heads * keys), few)
        return min(max(-(-length // SPANS), few), many, length)


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
    portions = _Portions(layout, q_BTNH, k_BSKH, *seen)
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
    portions = _Portions(layout, q_BTNH, k_BSKH, *seen)
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


class _Portions:
    """The queries as [P, C, K, G, rows, ...], the last ones repeated, and the keys of each.

    C rows of the batch make a portion: all B, or one where they are taken apart.
    """

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
        self.batch, self.length, heads, _ = q_BTNH.shape
        _, self.keys, self.kv_heads, _ = k_BSKH.shape
        self.window, self.segment_ids_BS = window, segment_ids_BS
        groups = heads // self.kv_heads
        self.apart = layout.apart and self.length >= SPANS * ROWS
        self.together = 1 if self.apart else self.batch
        self.rows = layout.rows(self.length, self.together, heads, groups, self.keys)
        self.count = -(-self.length // self.rows)
        lengths = min(SPANS, self.count)
        self.spans = [-(-self.keys * i // lengths) for i in range(1, lengths + 1)]
        ends = [min((i + 1) * self.rows, self.length) for i in range(self.count)]
        ends = [layout.keys(end, self.length, self.keys) for end in ends]
        self.ends_P = np.repeat(np.asarray(ends, np.int32), self.batch // self.together)
        self.row_P = np.tile(np.arange(0, self.batch, self.together, dtype=np.int32), self.count)
        positions = jnp.broadcast_to(positions_T, (self.batch // self.together, self.length))
        places = [positions, *([] if segment_ids_BT is None else [segment_ids_BT])]
        # A query that only fills up sees what the last one does, and no gradient comes to it.
        self.places = [self._split(x, mode="edge") for x in places]
        # Devices that have dealt the queries out would not agree on the spans.
        self.same_for_all = layout.runs > 1 or (segment_ids_BT is None and window is None)

    def _split(self, x: Array, **pad: Any) -> Array:
        """[B, T, ...] to [P, B, rows, ...]."""
        missing = self.count * self.rows - self.length
        x = jnp.pad(x, [(0, 0), (0, missing), *[(0, 0)] * (x.ndim - 2)], **pad)
        x = jnp.moveaxis(x.reshape(x.shape[0], self.count, self.rows, *x.shape[2:]), 0, 1)
        return x if self.together > 1 else x.reshape(-1, 1, *x.shape[2:])

    def split(self, x_BTNX: Array) -> Float[Array, "P C K G rows X"]:
        batch, length, _, width = x_BTNX.shape
        grouped = x_BTNX.reshape(batch, length, self.kv_heads, -1, width)
        return jnp.moveaxis(self._split(grouped), 2, 4)

    def join(self, x: Float[Array, "P C K G rows X"]) -> Float[Array, "B T N X"]:
        x = x.reshape(self.count, self.batch, *x.shape[2:])
        x = jnp.moveaxis(jnp.moveaxis(x, 4, 2), 1, 0)
        return x.reshape(x.shape[0], -1, x.shape[-3] * x.shape[-2], x.shape[-1])[:, : self.length]

    def scan(self, with_keys: Callable[[int], Any], carry: Any, queries: Any) -> tuple[Any, Any]:
        """`lax.scan` over the portions of `with_keys(span)`, with the shortest span that will do.

        `with_keys(span)(carry, queries, where, place) -> (carry, result)`, `where` being the row
        and the first key of the span.
        """
        if self.same_for_all:
            return self._scan_known(with_keys, carry, queries)
        bodies = [with_keys(span) for span in self.spans]

        def body(carry: Any, portion: Any) -> Any:
            which, *rest = _tied(portion)
            return jax.lax.switch(which, bodies, carry, *rest)

        which_P, first_P = self._spans(jnp.asarray(self.ends_P) - self._first_keys())
        where = (jnp.asarray(self.row_P), first_P)
        return jax.lax.scan(body, carry, (which_P, queries, where, self.places))

    def _scan_known(self, with_keys: Any, carry: Any, queries: Any) -> tuple[Any, Any]:
        """The same where a span depends on its portion alone: a scan for each span."""
        which_P, first_P = map(np.asarray, self._spans(self.ends_P))
        results = []
        for which in np.unique(which_P):
            attend_portion = with_keys(self.spans[which])
            own = slice(*np.searchsorted(which_P, [which, which + 1]))
            where = (jnp.asarray(self.row_P), jnp.asarray(first_P))
            portions = (queries, where, self.places)
            carry, result = jax.lax.scan(
                functools.partial(_tied_body, attend_portion),
                carry,
                jax.tree.map(lambda x, own=own: x[own], portions),
            )
            results.append(result)
        return carry, jax.tree.map(lambda *parts: jnp.concatenate(parts), *results)

    def _spans(self, needed_P: Any) -> tuple[Any, Any]:
        """Which span holds so many keys up to the last that a portion sees, and its first key."""
        spans = np.asarray(self.spans, np.int32)
        xp = np if isinstance(needed_P, np.ndarray) else jnp
        which_P = xp.searchsorted(xp.asarray(spans), needed_P).astype(np.int32)
        return which_P, xp.maximum(self.ends_P - xp.asarray(spans)[which_P], 0)

    def _first_keys(self) -> Int[Array, "P"]:
        """Of each portion the first key that any of its queries sees."""
        positions = self.places[0]
        first = jnp.zeros_like(positions)
        if self.segment_ids_BS is not None:
            segments, keys = self.segment_ids_BS, jnp.arange(self.keys, dtype=jnp.int32)
            begins = jnp.pad(segments[:, 1:] != segments[:, :-1], ((0, 0), (1, 0)))
            starts_BS = jax.lax.cummax(jnp.where(begins, keys, 0), axis=1)
            first = self._split(starts_BS, mode="edge")
        if self.window is not None:
            first = jnp.maximum(first, positions - self.window + 1)
        return first.min(axis=(1, 2))

    def part(self, x_BKSH: Array, where: Any, keys: int) -> Float[Array, "B K S H"]:
        """So many keys, or values, of a portion."""
        row, first = self._start(where)
        x_CKSH = jax.lax.dynamic_slice_in_dim(x_BKSH, row, self.together, axis=0)
        return jax.lax.dynamic_slice_in_dim(x_CKSH, first, keys, axis=2)

    def added(self, where: Any, sums_BKHS: Array, x_CKHS: Array) -> Float[Array, "B K H S"]:
        """Sums of all keys with those of a portion added."""
        row, first = self._start(where)
        start = (row, 0, 0, first)
        there = jax.lax.dynamic_slice(sums_BKHS, start, x_CKHS.shape)
        return jax.lax.dynamic_update_slice(sums_BKHS, there + x_CKHS, start)

    def _start(self, where: Any) -> tuple[Any, Any]:
        """The row, a constant where the batch is not sliced, and the first key."""
        row, first = where
        return (row, first) if self.apart else (np.int32(0), first)

    def visible(self, place: Sequence[Array], where: Any, keys: int) -> Bool[Array, "... T S"]:
        """Which of so many keys the queries of a portion see."""
        row, first = self._start(where)
        positions_T, key_S = place[0][0], first + jnp.arange(keys, dtype=jnp.int32)
        distance = positions_T[:, None] - key_S
        visible = distance >= 0
        if self.window is not None:
            visible = visible & (distance < self.window)
        if self.segment_ids_BS is None:
            return visible
        own_CS = jax.lax.dynamic_slice(self.segment_ids_BS, (row, first), (self.together, keys))
        same = place[1][:, :, None] == own_CS[:, None]
        return (visible & same)[:, None, None]


def _tied_body(attend_portion: Any, carry: Any, portion: Any) -> Any:
    return attend_portion(carry, *_tied(portion))


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


def _tied(portion: Any) -> Any:
    """Else the compiler finds that what a query sees is the same in every layer, and keeps it."""
    return jax.lax.optimization_barrier(portion)


def _scale(q_BKGTH: Array) -> float:
    return q_BKGTH.shape[-1] ** -0.5


def _f32(x: Array) -> Float[Array, "..."]:
    return x.astype(jnp.float32)
