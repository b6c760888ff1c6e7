"""Which rows share a line."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np


@dataclass(frozen=True)
class Lines:
    """Lines of one row or several.

    Attributes:
      rows: int64, the indices of the rows, line after line.
      ends: int64 [lines], where each line ends in them.
    """

    rows: np.ndarray
    ends: np.ndarray

    def __len__(self) -> int:
        return len(self.ends)

    def __getitem__(self, line: int) -> np.ndarray:
        return self.rows[self.ends[line - 1] if line else 0 : self.ends[line]]


def one_row_a_line(count: int) -> Lines:
    return Lines(np.arange(count), np.arange(1, count + 1))


def packed(lengths: np.ndarray, order: np.ndarray, capacity: int) -> Lines:
    """Every row in one line, by first fit in the given order.

    Args:
      lengths: int [rows], none above `capacity`.
      order: int [rows], the order in which they are placed.
      capacity: tokens of a line.
    """
    line_of = np.array(first_fit(lengths[order].tolist(), capacity))
    return Lines(order[np.argsort(line_of, kind="stable")], np.cumsum(np.bincount(line_of)))


def first_fit(sizes: Sequence[int], capacity: int) -> list[int]:
    """For every item the first bin with room for it, bins numbered from 0.

    Over the bins stands a binary tree of the most room below each node (the root is node 1, the
    children of node k are 2k and 2k + 1), so that an item costs the logarithm of their number. A
    bin that is not in use yet is an empty one.
    """
    leaves = 1 << max(len(sizes) - 1, 0).bit_length()
    room = [capacity] * (2 * leaves)
    bins = []
    for size in sizes:
        if size > capacity:
            raise ValueError(f"an item of {size} does not fit a bin of {capacity}")
        node = 1
        while node < leaves:
            node *= 2
            if room[node] < size:
                node += 1
        bins.append(node - leaves)
        room[node] -= size
        while node > 1:
            node //= 2
            room[node] = max(room[2 * node], room[2 * node + 1])
    return bins
