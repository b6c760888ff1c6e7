"""The queries of blockwise attention in portions, and for each the keys that it may see.

Letters: as in `blockwise.py`; `P` portion, `C` rows of the batch in a portion.
"""

from __future__ import annotations

import functools
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Bool, Float, Int

SPANS = 8  # lengths that a span of keys may have, and portions at least
SCORES = 2**23  # of a portion on one device, unless that left the matrix units too few rows
ROWS = 128  # which is so many


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


class Portions:
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


def _tied(portion: Any) -> Any:
    """Else the compiler finds that what a query sees is the same in every layer, and keeps it."""
    return jax.lax.optimization_barrier(portion)
