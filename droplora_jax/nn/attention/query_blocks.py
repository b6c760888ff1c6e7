"""The queries of blockwise attention in blocks, each with a span of the keys that it may see.

Letters: as in `blockwise.py`; `P` blocks, `C` rows of the batch in a block, `Q` queries of one row
in a block.
"""

from __future__ import annotations

import functools
from collections.abc import Callable
from dataclasses import dataclass
from typing import NamedTuple, TypeVar

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Bool, Float, Int

MAX_SPAN_LENGTHS = 8  # key-span lengths to compile; also the least number of query blocks
MAX_SCORES = 2**23  # per block and device, exceeded only to keep MIN_ROWS
MIN_ROWS = 128  # fewer leave matrix units idle

Carry = TypeVar("Carry")
Queries = TypeVar("Queries")
Result = TypeVar("Result")
Tree = TypeVar("Tree")


@dataclass(frozen=True)
class Layout:
    """Where the queries and keys of a row are.

    Attributes:
      devices: how many devices share batch and heads.
      runs: how many runs of consecutive positions the queries are. With more than one, the row
        consists of as many runs of equal length, and the queries are the same part of each.
      separate_rows: long rows of the batch are attended one by one, each with no more keys than
        it needs. This suits a single device that is busy with a part of a row.
    """

    devices: int = 1
    runs: int = 1
    separate_rows: bool = False

    def keys(self, end: int, queries: int, keys: int) -> int:
        """How many keys the first `end` queries of a row see at most."""
        if self.runs == 1:
            return min(end, keys)
        return min(-(-end * self.runs // queries) * (keys // self.runs), keys)

    def rows(self, length: int, batch: int, heads: int, groups: int, keys: int) -> int:
        """How many queries of a row a block has."""
        fewest = -(-MIN_ROWS // groups)
        most = max(self.devices * MAX_SCORES // (batch * heads * keys), fewest)
        return min(max(-(-length // MAX_SPAN_LENGTHS), fewest), most, length)


class Visibility(NamedTuple):
    """What decides which keys a query sees: earlier ones of its own segment, inside the window.

    Attributes:
      positions_T: the queries' positions in their row, ascending.
      segment_ids_BT, segment_ids_BS: segments of queries and keys; None: a row is one segment.
      window: how many positions a query sees, itself included; None: all before it.
    """

    positions_T: Int[Array, "T"]
    segment_ids_BT: Int[Array, "B T"] | None
    segment_ids_BS: Int[Array, "B S"] | None
    window: Int[Array, ""] | int | None


class Block(NamedTuple):
    """One block, or [P, ...] all of them: where its queries are, and where its keys begin.

    Attributes:
      row: the first row of the batch.
      first_key: the first key of its span.
      positions, segment_ids: of its queries.
    """

    row: Int[Array, "*P"]
    first_key: Int[Array, "*P"]
    positions: Int[Array, "*P 1 Q"]
    segment_ids: Int[Array, "*P C Q"] | None


# What is done with one block: `(carry, queries, block) -> (carry, result)`.
Body = Callable[[Carry, Queries, Block], tuple[Carry, Result]]


class QueryBlocks:
    """The queries as [P, C, K, G, Q, ...], the last ones repeated to fill up, and each one's keys.

    C rows of the batch make a block: all B, or one if rows are separate.
    """

    def __init__(self, layout: Layout, q_BTNH: Array, k_BSKH: Array, seen: Visibility) -> None:
        self.batch, self.length, heads, _ = q_BTNH.shape
        _, self.keys, self.kv_heads, _ = k_BSKH.shape
        self.window, self.segment_ids_BS = seen.window, seen.segment_ids_BS
        groups = heads // self.kv_heads
        self.separate_rows = layout.separate_rows and self.length >= MAX_SPAN_LENGTHS * MIN_ROWS
        self.batch_rows = 1 if self.separate_rows else self.batch  # C
        self.rows = layout.rows(self.length, self.batch_rows, heads, groups, self.keys)  # Q
        self.count = -(-self.length // self.rows)
        lengths = min(MAX_SPAN_LENGTHS, self.count)
        self.span_lengths = [-(-self.keys * i // lengths) for i in range(1, lengths + 1)]
        ends = [min((i + 1) * self.rows, self.length) for i in range(self.count)]
        ends = [layout.keys(end, self.length, self.keys) for end in ends]
        groups_of_rows = self.batch // self.batch_rows
        self.ends_P = np.repeat(np.asarray(ends, np.int32), groups_of_rows)
        first_rows = np.arange(0, self.batch, self.batch_rows, dtype=np.int32)
        self.row_P = np.tile(first_rows, self.count)
        # A query that only fills up sees what the last one sees, and gets no gradient.
        positions = jnp.broadcast_to(seen.positions_T, (groups_of_rows, self.length))
        self.positions = self._split(positions, "edge")
        segments = seen.segment_ids_BT
        self.segment_ids = None if segments is None else self._split(segments, "edge")
        # With several runs spans are static: data-dependent ones could differ between devices.
        self.spans_are_constant = layout.runs > 1 or (segments is None and seen.window is None)

    def _split(self, x: Array, fill: str = "constant") -> Array:
        """[B, T, ...] to [P, C, Q, ...]; `fill` is the mode of `jnp.pad`."""
        missing = self.count * self.rows - self.length
        x = jnp.pad(x, [(0, 0), (0, missing), *[(0, 0)] * (x.ndim - 2)], mode=fill)
        x = jnp.moveaxis(x.reshape(x.shape[0], self.count, self.rows, *x.shape[2:]), 0, 1)
        return x if self.batch_rows > 1 else x.reshape(-1, 1, *x.shape[2:])

    def split(self, x_BTNX: Array) -> Float[Array, "P C K G Q X"]:
        """The rows of a tensor of the queries, block by block."""
        batch, length, _, width = x_BTNX.shape
        grouped = x_BTNX.reshape(batch, length, self.kv_heads, -1, width)
        return jnp.moveaxis(self._split(grouped), 2, 4)

    def join(self, x: Float[Array, "P C K G Q X"]) -> Float[Array, "B T N X"]:
        """The inverse of `split`."""
        x = x.reshape(self.count, self.batch, *x.shape[2:])
        x = jnp.moveaxis(jnp.moveaxis(x, 4, 2), 1, 0)
        return x.reshape(x.shape[0], -1, x.shape[-3] * x.shape[-2], x.shape[-1])[:, : self.length]

    def scan(
        self,
        body_for: Callable[[int], Body[Carry, Queries, Result]],
        carry: Carry,
        queries: Queries,
    ) -> tuple[Carry, Result]:
        """`lax.scan` over the blocks, each with the shortest span that holds the keys it sees.

        Args:
          body_for: makes the body for a span of so many keys.
          queries: a tree of [P, ...], from `split`.
        """
        if self.spans_are_constant:
            return self._scan_constant(body_for, carry, queries)
        bodies = [body_for(length) for length in self.span_lengths]

        def body(carry: Carry, xs: tuple[Array, Queries, Block]) -> tuple[Carry, Result]:
            which, block_queries, block = _not_hoisted(xs)
            return jax.lax.switch(which, bodies, carry, block_queries, block)

        needed_P = jnp.asarray(self.ends_P) - self._first_visible_keys()
        lengths = jnp.asarray(self.span_lengths, jnp.int32)
        which_P = jnp.searchsorted(lengths, needed_P).astype(jnp.int32)
        first_P = jnp.maximum(self.ends_P - lengths[which_P], 0)
        return jax.lax.scan(body, carry, (which_P, queries, self._blocks(first_P)))

    def _scan_constant(
        self,
        body_for: Callable[[int], Body[Carry, Queries, Result]],
        carry: Carry,
        queries: Queries,
    ) -> tuple[Carry, Result]:
        """The same where a span depends only on the block's place: one scan for each length."""
        lengths = np.asarray(self.span_lengths, np.int32)
        which_P = np.searchsorted(lengths, self.ends_P).astype(np.int32)
        blocks = self._blocks(jnp.asarray(np.maximum(self.ends_P - lengths[which_P], 0)))
        results = []
        for which in np.unique(which_P):
            of_length = slice(*np.searchsorted(which_P, [which, which + 1]))
            carry, result = jax.lax.scan(
                functools.partial(_with_barrier, body_for(self.span_lengths[which])),
                carry,
                jax.tree.map(lambda x, of_length=of_length: x[of_length], (queries, blocks)),
            )
            results.append(result)
        return carry, jax.tree.map(lambda *parts: jnp.concatenate(parts), *results)

    def _blocks(self, first_P: Int[Array, "P"]) -> Block:
        return Block(jnp.asarray(self.row_P), first_P, self.positions, self.segment_ids)

    def _first_visible_keys(self) -> Int[Array, "P"]:
        """For each block, the first key that any of its queries sees."""
        first = jnp.zeros_like(self.positions)
        if self.segment_ids_BS is not None:
            segments, keys = self.segment_ids_BS, jnp.arange(self.keys, dtype=jnp.int32)
            begins = jnp.pad(segments[:, 1:] != segments[:, :-1], ((0, 0), (1, 0)))
            starts_BS = jax.lax.cummax(jnp.where(begins, keys, 0), axis=1)
            first = self._split(starts_BS, "edge")
        if self.window is not None:
            first = jnp.maximum(first, self.positions - self.window + 1)
        return first.min(axis=(1, 2))

    def keys_of(self, block: Block, x_BKSH: Array, length: int) -> Float[Array, "C K S H"]:
        """The keys, or values, in a block's span of `length`."""
        x_CKSH = jax.lax.dynamic_slice_in_dim(x_BKSH, self._row(block), self.batch_rows, axis=0)
        return jax.lax.dynamic_slice_in_dim(x_CKSH, block.first_key, length, axis=2)

    def add(self, block: Block, sums_BKHS: Array, x_CKHS: Array) -> Float[Array, "B K H S"]:
        """Sums over all keys, with a block's share added in its span."""
        start = (self._row(block), 0, 0, block.first_key)
        before = jax.lax.dynamic_slice(sums_BKHS, start, x_CKHS.shape)
        return jax.lax.dynamic_update_slice(sums_BKHS, before + x_CKHS, start)

    def visible(self, block: Block, length: int) -> Bool[Array, "... Q S"]:
        """Which of the `length` keys in its span the queries of a block see."""
        key_S = block.first_key + jnp.arange(length, dtype=jnp.int32)
        distance = block.positions[0][:, None] - key_S
        visible = distance >= 0
        if self.window is not None:
            visible = visible & (distance < self.window)
        if self.segment_ids_BS is None or block.segment_ids is None:
            return visible
        start = (self._row(block), block.first_key)
        segments_CS = jax.lax.dynamic_slice(self.segment_ids_BS, start, (self.batch_rows, length))
        same = block.segment_ids[:, :, None] == segments_CS[:, None]
        return (visible & same)[:, None, None]

    def _row(self, block: Block) -> Int[Array, ""] | np.int32:
        """A block's first row of the batch; a constant where a block has all rows."""
        return block.row if self.separate_rows else np.int32(0)


def _with_barrier(
    body: Body[Carry, Queries, Result], carry: Carry, xs: tuple[Queries, Block]
) -> tuple[Carry, Result]:
    return body(carry, *_not_hoisted(xs))


def _not_hoisted(xs: Tree) -> Tree:
    """Keeps XLA from moving the visibility masks out of the scan over layers.

    The masks do not depend on the layer, so XLA would compute them all before that scan and hold
    them in memory.
    """
    return jax.lax.optimization_barrier(xs)
