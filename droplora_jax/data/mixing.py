"""Sources in proportion to their weights, and rows that are held out."""

from __future__ import annotations

import sys
from collections.abc import Sequence
from fractions import Fraction
from math import gcd, lcm

import grain
import numpy as np

from droplora_jax.data.rows import Rows
from droplora_jax.errors import InputError

LARGEST = 10**6  # lines in which every source has its share exactly


class Schedule(grain.transforms.DatasetSelectionMap):
    """Which source each line is taken from, and how many of it were taken before.

    Of every `len(pattern)` lines each source has its share exactly, spread evenly.
    """

    def __init__(self, weights: Sequence[float]) -> None:
        """
        Raises:
          InputError: one weight is too small beside the others.
        """
        self._shares = _whole(weights)
        # The j-th of w lines of a source stands at (j + 1/2) / w of the way.
        places = [(np.arange(w) + 0.5) / w for w in self._shares]
        source = np.repeat(np.arange(len(self._shares)), self._shares)
        number = np.concatenate([np.arange(w) for w in self._shares])
        order = np.lexsort((source, np.concatenate(places)))
        self._source, self._number = source[order], number[order]

    def __len__(self) -> int:
        return sys.maxsize

    def __getitem__(self, index: int) -> tuple[int, int]:
        turn, at = divmod(index, len(self._source))
        source = int(self._source[at])
        return source, turn * self._shares[source] + int(self._number[at])


def _whole(weights: Sequence[float]) -> list[int]:
    """The smallest whole numbers in the proportions of some decimals."""
    exact = [Fraction(str(weight)) for weight in weights]
    common = lcm(*(weight.denominator for weight in exact))
    shares = [int(weight * common) for weight in exact]
    shares = [share // gcd(*shares) for share in shares]
    if sum(shares) > LARGEST:
        raise InputError(
            f"data.train: the weights {', '.join(map(str, weights))} can't be kept within "
            f"{LARGEST:,} lines; round them"
        )
    return shares


def held_out(rows: Rows, fraction: float, seed: int) -> tuple[Rows, Rows]:
    """Training and validation rows.

    Which they are depends on the seed and on what a row holds, not on where it stands: equal rows,
    and the pieces of one text, are on the same side, whatever is moved in a file or between files.

    Raises:
      InputError: nothing would be left on one side, or of a source to train on.
    """
    marks = mixed(rows.keys, seed)
    count = round(fraction * len(rows))
    if not count:
        raise InputError(
            f"data.valid_fraction={fraction} of {len(rows)} rows is none; raise it, or set it to "
            "null"
        )
    out = marks <= np.partition(marks, count - 1)[count - 1]
    train, valid = rows.only(np.flatnonzero(~out)), rows.only(np.flatnonzero(out))
    if not all(train.counts):
        raise InputError(
            f"data.valid_fraction={fraction}: of {rows.counts} rows of the sources, "
            f"{valid.counts} would be held out and too few left (equal rows are kept together)"
        )
    return train, valid


def mixed(keys: np.ndarray, seed: int) -> np.ndarray:
    """uint64: other numbers for other seeds, equal ones for equal keys (SplitMix64's mixing)."""
    word = np.random.SeedSequence(seed).generate_state(1, np.uint64)[0]
    with np.errstate(over="ignore"):
        x = keys + word
        x = (x ^ (x >> np.uint64(30))) * np.uint64(0xBF58476D1CE4E5B9)
        x = (x ^ (x >> np.uint64(27))) * np.uint64(0x94D049BB133111EB)
        return x ^ (x >> np.uint64(31))
