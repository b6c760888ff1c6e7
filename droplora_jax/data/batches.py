"""Batches without end, each a pure function of the examples, the seed and its index."""

from __future__ import annotations

import math
import operator
from collections.abc import Sequence
from fractions import Fraction
from typing import SupportsIndex

import grain
import numpy as np

from droplora_jax.core.errors import InputError
from droplora_jax.data.batch import IGNORE, Batch
from droplora_jax.data.mixing import Schedule
from droplora_jax.data.packing import Fit, Sequences, joined, one_example_each, packed
from droplora_jax.data.rows import Row, Rows

NOTHING = -1  # the index of a sequence that is padding alone


class Batches:
    """`batches[n]` is batch n, for every n >= 0.

    Every epoch holds each sequence once, shuffled anew if `shuffle`; epochs follow one another
    without a gap, so a batch can span two. Which examples share a sequence is decided here, once.

    With weights the examples come from several sources. Each source has epochs of its own, and
    sequences are taken from the sources in proportion to the weights. An epoch of the mixture has
    as many sequences as all sources together; some then occur more than once and some not at all.

    Attributes:
      sequences_per_epoch: sequences that hold all examples once: one for each example, or fewer
        with packing.
      utilisation: the fraction of their positions that hold a token.
      max_length: T, the tokens of a sequence.
      packed: whether a sequence may hold several documents.
      indices: the indices [G] of the sequences of every batch, an endless dataset.
    """

    def __init__(
        self,
        rows: Sequence[Row],
        *,
        batch_size: int,
        seed: int,
        shuffle: bool,
        max_length: int,
        packing: Fit | None = None,
        weights: Sequence[float] | None = None,
    ) -> None:
        """
        Args:
          rows: the examples, each of 1 to `max_length` tokens.
          batch_size: G, the sequences of a batch.
          seed: for the order in which examples are packed, and of the sequences in every epoch.
          shuffle: if false, the examples keep their order.
          max_length: T, the tokens of a sequence.
          packing: several documents to a sequence; none is split, and all are of one source.
          weights: of the sources of `Rows` that are mixed.

        Raises:
          InputError: there is no example, one is too long, or a number is out of range.
        """
        lengths = rows.lengths if isinstance(rows, Rows) else np.array([len(r) for r in rows], int)
        _check(lengths, batch_size, seed, max_length)
        self._rows, self.max_length, self._batch_size = rows, max_length, batch_size
        self.packed = packing is not None
        counts = rows.counts if weights and isinstance(rows, Rows) else [len(rows)]
        # Through SeedSequence, since grain takes seed + epoch: run 1 would repeat run 0.
        seeds = np.random.SeedSequence(seed).generate_state(2 * len(counts)).reshape(-1, 2).tolist()
        sources = [
            _sequences(source, packing, max_length, packing_seed if shuffle else None)
            for source, (packing_seed, _) in zip(_cut(lengths, counts), seeds, strict=True)
        ]
        self._sequences = joined(sources)
        self.utilisation = float(lengths.sum()) / (len(self._sequences) * max_length)
        epochs, start = [], 0
        for source, (_, shuffle_seed) in zip(sources, seeds, strict=True):
            indices = grain.MapDataset.range(start, start + len(source))
            # `repeat` after `shuffle` gives every epoch another order.
            epochs.append((indices.shuffle(seed=shuffle_seed) if shuffle else indices).repeat())
            start += len(source)
        mixed = epochs[0]
        if weights:
            mixed = grain.MapDataset.select_from_datasets(epochs, Schedule(weights))
        # An endless dataset has no remainder to drop. But only with `drop_remainder` is its length
        # computed in integers; else it is a float, rounded up beyond what a length may be.
        self.indices: grain.MapDataset[np.ndarray] = mixed.batch(batch_size, drop_remainder=True)

    @property
    def sequences_per_epoch(self) -> int:
        return len(self._sequences)

    def steps(self, epochs: float) -> int:
        """Batches that hold the examples `epochs` times, the last one full."""
        # From the decimal as it was written: 1.1 * 10 is above 11 in binary.
        sequences = Fraction(str(epochs)) * self.sequences_per_epoch
        return math.ceil(sequences / self._batch_size)

    def __getitem__(self, n: SupportsIndex) -> Batch:
        index = operator.index(n)
        if index < 0:
            raise IndexError(f"batch {index}: batches are counted from 0 and have no last one")
        return self.take(self.indices[index])

    def all_indices(self) -> np.ndarray:
        """The indices of all sequences in order [n, G]; `NOTHING` fills the last batch."""
        size = self._batch_size
        indices = np.arange(-(-self.sequences_per_epoch // size) * size)
        indices[self.sequences_per_epoch :] = NOTHING
        return indices.reshape(-1, size)

    def take(self, indices: Sequence[int] | np.ndarray) -> Batch:
        """The sequences of these indices [m], which may be `NOTHING`."""
        documents = [
            [] if index == NOTHING else [self._rows[int(i)] for i in self._sequences[int(index)]]
            for index in indices
        ]
        return collate(documents, self.max_length)


def collate(sequences: Sequence[Sequence[Row]], length: int) -> Batch:
    """Lay out the documents of each sequence in `length` tokens, the rest of which is padding."""
    shape = len(sequences), length
    tokens = np.zeros(shape, np.int32)
    targets = np.full(shape, IGNORE, np.int32)
    segment_ids = np.zeros(shape, np.int32)
    for g, documents in enumerate(sequences):
        start = 0
        for number, row in enumerate(documents, 1):
            end = start + len(row)
            tokens[g, start:end] = row.ids
            targets[g, start : end - 1] = np.where(row.trained[1:], row.ids[1:], IGNORE)
            segment_ids[g, start:end] = number
            start = end
    return Batch(tokens=tokens, targets=targets, segment_ids=segment_ids)


def _sequences(
    lengths: np.ndarray, packing: Fit | None, capacity: int, seed: int | None
) -> Sequences:
    """The sequences of one source; its examples are placed in order if there is no seed."""
    if packing is None:
        return one_example_each(len(lengths))
    order = np.arange(len(lengths)) if seed is None else _order(len(lengths), seed)
    return packed(lengths, order, capacity, packing)


def _cut(array: np.ndarray, counts: Sequence[int]) -> list[np.ndarray]:
    return np.split(array, np.cumsum(counts)[:-1])


def _order(count: int, seed: int) -> np.ndarray:
    # Raw bits: numpy promises these for every version, but not `permutation`.
    return np.argsort(np.random.PCG64(seed).random_raw(count), kind="stable")


def _check(lengths: np.ndarray, batch_size: int, seed: int, max_length: int) -> None:
    if not len(lengths):
        raise InputError("there is no row to make batches of")
    if lengths.max() > max_length or lengths.min() < 1:
        index = int(np.argmax((lengths > max_length) | (lengths < 1)))
        raise InputError(
            f"row {index} has {lengths[index]} tokens: must be from 1 to max_length={max_length}"
        )
    if batch_size < 1:
        raise InputError(f"batch_size={batch_size}: must be at least 1")
    if seed < 0:
        raise InputError(f"seed={seed}: must be at least 0")
