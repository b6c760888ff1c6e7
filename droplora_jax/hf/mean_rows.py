"""A stored table with rows for tokens that are added to it: the mean of the others."""

from __future__ import annotations

from dataclasses import replace
from functools import cached_property

import numpy as np

from droplora_jax.hf.safetensors_file import TensorFile

ROWS = 4096  # that are summed at a time


class MeanRows(TensorFile):
    """One table of a file, in which some rows are the mean of all rows before them.

    The mean is made when one of these rows is read, and cast once to the stored dtype.

    Args:
      first, stop: these rows, which may lie beyond those that are stored.
    """

    def __init__(self, file: TensorFile, tensor: str, first: int, stop: int) -> None:
        self.name, self.tensor = file.name, tensor
        self._file, self._first, self._stop = file, first, stop
        entry = file.entries[tensor]
        self._stored = entry.shape[0]
        shape = (max(self._stored, stop), *entry.shape[1:])
        self.entries = {tensor: replace(entry, shape=shape)}

    def rows(self, tensor: str, first: int, last: int) -> np.ndarray:
        out = np.empty((last - first, *self.entries[tensor].shape[1:]), self.dtype(tensor))
        if first < (stop := min(last, self._stored)):
            out[: stop - first] = self._file.rows(tensor, first, stop)
        added = out[max(self._first - first, 0) : max(self._stop - first, 0)]
        if added.size:
            added[:] = self._mean
        return out

    def release(self, tensor: str, first: int, last: int) -> None:
        self._file.release(tensor, min(first, self._stored), min(last, self._stored))

    @cached_property
    def _mean(self) -> np.ndarray:
        total = np.zeros(self.entries[self.tensor].shape[1:], np.float64)
        for first in range(0, self._first, ROWS):
            stop = min(first + ROWS, self._first)
            block = self._file.rows(self.tensor, first, stop)
            total += block.astype(np.float32).sum(axis=0, dtype=np.float64)
            self._file.release(self.tensor, first, stop)
        return (total / self._first).astype(np.float32).astype(self.dtype(self.tensor))
