"""Batches as an endless sequence that is a function of rows, seed and index alone."""

from __future__ import annotations

import math
import operator
from collections.abc import Sequence
from fractions import Fraction
from typing import SupportsIndex, TypedDict

import grain
import numpy as np

from droplora_jax.core.errors import InputError
from droplora_jax.data.mixing import Schedule
from droplora_jax.data.packing import Fit, Lines, joined, one_row_a_line, packed
from droplora_jax.data.rows import Row, Rows

PADDING = -1


class Batch(TypedDict):
    """G lines of T tokens, int32.

    Attributes:
      tokens: [G, T], 0 in padding.
      targets: [G, T], the next token of the same document where that is trained, else -1.
      segment_ids: [G, T], 1, 2, ... for the documents of a line; 0 is padding.
    """

    tokens: np.ndarray
    targets: np.ndarray
    segment_ids: np.ndarray


class Batches:
    """`batches[n]` is batch n, for every n >= 0.

    Every epoch holds each line once, in an order of its own if `shuffle`; one follows the other
    without a gap, so a batch can span two. Which rows share a line is settled here, once.

    With weights the rows are of several sources. Each goes through epochs of its own, and the
    lines are taken from them in proportion to the weights. An epoch of the whole is as many lines
    as all sources have together, of which some are then there more than once and some not at all.

    Attributes:
      lines_per_epoch: lines that hold all rows once: as many as rows, or fewer with packing.
      utilisation: the part of their positions that holds a token.
      max_length: T, the tokens of a line.
      packed: whether a line may hold several rows.
      numbers: the numbers of every batch's lines, [G] each.
    """

    def __init__(
        self,
        rows: Sequence[Row],
        *,
        rows_per_batch: int,
        seed: int,
        shuffle: bool,
        max_length: int,
        packing: Fit | None = None,
        weights: Sequence[float] | None = None,
    ) -> None:
        """
        Args:
          rows: the documents, each of 1 to `max_length` tokens.
          rows_per_batch: G, the lines of a batch.
          seed: of the order of the rows while they are packed, and of the lines in every epoch.
          shuffle: or keep the order of the rows.
          max_length: T, the tokens of a line.
          packing: several documents a line, none of them split and none of another source.
          weights: of the sources of `Rows` that are mixed.

        Raises:
          InputError: there is no row, a row is too long, or a number is out of range.
        """
        lengths = rows.lengths if isinstance(rows, Rows) else np.array([len(r) for r in rows], int)
        _check(lengths, rows_per_batch, seed, max_length)
        self._rows, self.max_length, self._rows_per_batch = rows, max_length, rows_per_batch
        self.packed = packing is not None
        counts = rows.counts if weights and isinstance(rows, Rows) else [len(rows)]
        # Through SeedSequence, since grain takes seed + epoch: run 1 would repeat run 0.
        seeds = np.random.SeedSequence(seed).generate_state(2 * len(counts)).reshape(-1, 2).tolist()
        parts = [
            _lines(own, packing, max_length, packing_seed if shuffle else None)
            for own, (packing_seed, _) in zip(_cut(lengths, counts), seeds, strict=True)
        ]
        self._lines = joined(parts)
        self.utilisation = float(lengths.sum()) / (len(self._lines) * max_length)
        numbers, start = [], 0
        for part, (_, shuffle_seed) in zip(parts, seeds, strict=True):
            own = grain.MapDataset.range(start, start + len(part))
            # `repeat` after `shuffle` gives every epoch an order of its own.
            numbers.append((own.shuffle(seed=shuffle_seed) if shuffle else own).repeat())
            start += len(part)
        mixed = numbers[0]
        if weights:
            mixed = grain.MapDataset.select_from_datasets(numbers, Schedule(weights))
        # What has no end has no remainder to drop; but only so is its length computed in whole
        # numbers. As a float it is rounded up, beyond what a length may be in batches of one line.
        batched = mixed.batch(rows_per_batch, drop_remainder=True)
        self.numbers: grain.MapDataset[np.ndarray] = batched

    @property
    def lines_per_epoch(self) -> int:
        return len(self._lines)

    def steps(self, epochs: float) -> int:
        """Batches that hold the rows `epochs` times, the last one full."""
        # By way of the decimal that was written: 1.1 * 10 is above 11 in binary.
        lines = Fraction(str(epochs)) * self.lines_per_epoch
        return math.ceil(lines / self._rows_per_batch)

    def __getitem__(self, n: SupportsIndex) -> Batch:
        return self.collate(self.lines(n))

    def lines(self, n: SupportsIndex) -> np.ndarray:
        """The numbers of batch n's lines [G]."""
        index = operator.index(n)
        if index < 0:
            raise IndexError(f"batch {index}: batches are counted from 0 and have no last one")
        return np.asarray(self.numbers[index], np.int64)

    def lines_once(self) -> np.ndarray:
        """The numbers of all lines, unshuffled, batch by batch [n, G]; the last is filled up.

        `PADDING` is the number of a line that is nothing else.
        """
        size = self._rows_per_batch
        numbers = np.arange(-(-self.lines_per_epoch // size) * size)
        numbers[self.lines_per_epoch :] = PADDING
        return numbers.reshape(-1, size)

    def collate(self, lines: Sequence[int] | np.ndarray) -> Batch:
        """The lines of these numbers."""
        documents = [
            [] if line == PADDING else [self._rows[int(i)] for i in self._lines[int(line)]]
            for line in lines
        ]
        return collate(documents, len(documents), self.max_length)


def collate(lines: Sequence[Sequence[Row]], count: int, length: int) -> Batch:
    """Lay documents out in `count` lines of `length` tokens, the rest of which is padding."""
    tokens = np.zeros((count, length), np.int32)
    targets = np.full((count, length), -1, np.int32)
    segment_ids = np.zeros((count, length), np.int32)
    for g, documents in enumerate(lines):
        start = 0
        for number, row in enumerate(documents, 1):
            end = start + len(row)
            tokens[g, start:end] = row.ids
            targets[g, start : end - 1] = np.where(row.trained[1:], row.ids[1:], -1)
            segment_ids[g, start:end] = number
            start = end
    return Batch(tokens=tokens, targets=targets, segment_ids=segment_ids)


def _lines(lengths: np.ndarray, packing: Fit | None, capacity: int, seed: int | None) -> Lines:
    """The lines of one source; its rows are placed in order if there is no seed."""
    if packing is None:
        return one_row_a_line(len(lengths))
    order = np.arange(len(lengths)) if seed is None else _order(len(lengths), seed)
    return packed(lengths, order, capacity, packing)


def _cut(array: np.ndarray, counts: Sequence[int]) -> list[np.ndarray]:
    return np.split(array, np.cumsum(counts)[:-1])


def _order(count: int, seed: int) -> np.ndarray:
    # Raw bits: numpy promises these for every version, but not `permutation`.
    return np.argsort(np.random.PCG64(seed).random_raw(count), kind="stable")


def _check(lengths: np.ndarray, rows_per_batch: int, seed: int, max_length: int) -> None:
    if not len(lengths):
        raise InputError("there is no row to make batches of")
    if lengths.max() > max_length or lengths.min() < 1:
        index = int(np.argmax((lengths > max_length) | (lengths < 1)))
        raise InputError(
            f"row {index} has {lengths[index]} tokens: must be from 1 to max_length={max_length}"
        )
    if rows_per_batch < 1:
        raise InputError(f"rows_per_batch={rows_per_batch}: must be at least 1")
    if seed < 0:
        raise InputError(f"seed={seed}: must be at least 0")
