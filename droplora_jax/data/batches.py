"""Batches as an endless sequence that is a function of rows, seed and index alone."""

from __future__ import annotations

import math
import operator
from collections.abc import Iterator, Sequence
from fractions import Fraction
from typing import SupportsIndex, TypedDict

import grain
import numpy as np

from droplora_jax.data.packing import one_row_a_line, packed
from droplora_jax.data.rows import Row
from droplora_jax.errors import InputError

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

    Attributes:
      lines_per_epoch: lines that hold all rows once: as many as rows, or fewer with packing.
      max_length: T, the tokens of a line.
    """

    def __init__(
        self,
        rows: Sequence[Row],
        *,
        rows_per_batch: int,
        seed: int,
        shuffle: bool,
        max_length: int,
        packing: bool = False,
    ) -> None:
        """
        Args:
          rows: the documents, each of 1 to `max_length` tokens.
          rows_per_batch: G, the lines of a batch.
          seed: of the order of the rows while they are packed, and of the lines in every epoch.
          shuffle: or keep the order of the rows.
          max_length: T, the tokens of a line.
          packing: several documents a line, none of them split.

        Raises:
          InputError: there is no row, a row is too long, or a number is out of range.
        """
        lengths = np.array([len(row) for row in rows], np.int64)
        _check(lengths, rows_per_batch, seed, max_length)
        # Through SeedSequence, since grain takes seed + epoch: run 1 would repeat run 0.
        packing_seed, shuffle_seed = np.random.SeedSequence(seed).generate_state(2).tolist()
        order = _order(len(rows), packing_seed) if shuffle else np.arange(len(rows))
        self._rows, self.max_length, self._rows_per_batch = rows, max_length, rows_per_batch
        self._lines = packed(lengths, order, max_length) if packing else one_row_a_line(len(rows))
        lines = grain.MapDataset.range(len(self._lines))
        if shuffle:
            lines = lines.shuffle(seed=shuffle_seed)
        # `repeat` after `shuffle` gives every epoch an order of its own.
        self._numbers = lines.repeat().batch(rows_per_batch)

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
        return np.asarray(self._numbers[index], np.int64)

    def lines_once(self) -> Iterator[np.ndarray]:
        """The numbers of all lines, unshuffled, batch by batch [G]; the last is filled up.

        `PADDING` is the number of a line that is nothing else.
        """
        size = self._rows_per_batch
        numbers = np.arange(-(-self.lines_per_epoch // size) * size)
        numbers[self.lines_per_epoch :] = PADDING
        yield from numbers.reshape(-1, size)

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
