"""Which examples share a sequence."""

from __future__ import annotations

import heapq
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Literal

import numpy as np

Fit = Literal["first_fit", "best_fit"]
_CHUNK = 2**16  # sizes that are Python numbers at a time
_NONE = 2**62  # no bin


@dataclass(frozen=True)
class Sequences:
    """Sequences of one example or several.

    Attributes:
      examples: int64, the indices of the examples, sequence after sequence.
      ends: int64 [sequences], where each sequence ends in `examples`.
    """

    examples: np.ndarray
    ends: np.ndarray

    def __len__(self) -> int:
        return len(self.ends)

    def __getitem__(self, index: int) -> np.ndarray:
        """The indices of the examples of one sequence."""
        return self.examples[self.ends[index - 1] if index else 0 : self.ends[index]]


def one_example_each(count: int) -> Sequences:
    return Sequences(np.arange(count), np.arange(1, count + 1))


def packed(lengths: np.ndarray, order: np.ndarray, capacity: int, fit: Fit) -> Sequences:
    """Every example in one sequence.

    Args:
      lengths: int [examples], none above `capacity`.
      order: int [examples], the order in which they are placed; with `best_fit` it holds among
        examples of the same length.
      capacity: tokens of a sequence.
      fit: `first_fit`: the first sequence with room. `best_fit`: the sequence with the least room
        that is enough, longer examples before shorter ones.
    """
    if fit == "best_fit":
        order = order[np.argsort(-lengths[order], kind="stable")]
    bin_of = bins(lengths[order], capacity, fit)
    return Sequences(order[np.argsort(bin_of, kind="stable")], np.cumsum(np.bincount(bin_of)))


def joined(parts: list[Sequences]) -> Sequences:
    """The sequences of several sources, whose examples are numbered source after source."""
    offsets = np.cumsum([0, *(len(part.examples) for part in parts)])
    return Sequences(
        np.concatenate([part.examples + at for part, at in zip(parts, offsets, strict=False)]),
        np.concatenate([part.ends + at for part, at in zip(parts, offsets, strict=False)]),
    )


def bins(sizes: np.ndarray, capacity: int, fit: Fit) -> np.ndarray:
    """The bin of every item, int64, bins numbered from 0 in the order in which they are opened.

    Among bins of equal room the best fit takes the one that was opened first. An item takes time
    logarithmic in the capacity and in the number of bins with room. A bin with less room than the
    smallest item is dropped, so that memory stays close to that of the sizes.
    """
    if len(sizes) and sizes.max() > capacity:
        raise ValueError(f"an item of {sizes.max()} does not fit a bin of {capacity}")
    open_bins = _OpenBins(capacity, fit)
    smallest = int(sizes.min(initial=capacity))
    bin_of = np.empty(len(sizes), np.int64)
    count = 0
    for i, size in enumerate(_numbers(sizes)):
        bin, room = open_bins.take(size)
        if bin == _NONE:
            bin, room = count, capacity
            count += 1
        bin_of[i] = bin
        if room - size >= smallest:
            open_bins.put(bin, room - size)
    return bin_of


def _numbers(sizes: np.ndarray) -> Iterator[int]:
    for start in range(0, len(sizes), _CHUNK):
        yield from sizes[start : start + _CHUNK].tolist()


class _OpenBins:
    """Bins with room, by how much they have.

    For every room there is a heap of the bins that have it, and over the rooms a binary tree of
    the first bin below each node: the root is node 1, the children of node k are 2k and 2k + 1.
    """

    def __init__(self, capacity: int, fit: Fit) -> None:
        self._leaves = 1 << capacity.bit_length()
        self._first = [_NONE] * (2 * self._leaves)
        self._heaps: list[list[int]] = [[] for _ in range(capacity + 1)]
        self._room: dict[int, int] = {}
        self._search = self._best_fit if fit == "best_fit" else self._first_fit

    def put(self, bin: int, room: int) -> None:
        heapq.heappush(self._heaps[room], bin)
        self._room[bin] = room
        self._update(room)

    def take(self, size: int) -> tuple[int, int]:
        """A bin with room for an item, and its room; `_NONE` if there is none."""
        bin = self._search(size)
        if bin == _NONE:
            return bin, 0
        room = self._room.pop(bin)
        heapq.heappop(self._heaps[room])
        self._update(room)
        return bin, room

    def _first_fit(self, size: int) -> int:
        """The first bin of all those with this room or more."""
        tree, node = self._first, size + self._leaves
        bin = tree[node]
        while node > 1:
            if not node & 1 and tree[node + 1] < bin:
                bin = tree[node + 1]
            node >>= 1
        return bin

    def _best_fit(self, size: int) -> int:
        """The first bin of those with the least room that is enough."""
        tree, node = self._first, size + self._leaves
        if tree[node] != _NONE:
            return tree[node]
        while node > 1 and (node & 1 or tree[node + 1] == _NONE):
            node >>= 1
        if node == 1:
            return _NONE
        node += 1
        while node < self._leaves:
            node *= 2
            if tree[node] == _NONE:
                node += 1
        return tree[node]

    def _update(self, room: int) -> None:
        tree, heap, node = self._first, self._heaps[room], room + self._leaves
        tree[node] = heap[0] if heap else _NONE
        while node > 1:
            node >>= 1
            left, right = tree[2 * node], tree[2 * node + 1]
            first = left if left < right else right
            if tree[node] == first:
                return
            tree[node] = first
