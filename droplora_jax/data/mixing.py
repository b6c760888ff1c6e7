"""Sources in proportion to their weights."""

from __future__ import annotations

import sys
from collections.abc import Sequence
from fractions import Fraction
from math import gcd, lcm

import grain
import numpy as np

from droplora_jax.core.errors import InputError

LONGEST_PERIOD = 10**6  # sequences after which every source has its share exactly


class Schedule(grain.transforms.DatasetSelectionMap):
    """For each sequence, its source and its number among the sequences of that source.

    The pattern of sources repeats after the sum of the shares; in each period every source has
    exactly its share, spread evenly.
    """

    def __init__(self, weights: Sequence[float]) -> None:
        """
        Raises:
          InputError: one weight is too small beside the others.
        """
        self._shares = _whole(weights)
        # The j-th of w sequences of a source stands at (j + 1/2) / w of the period.
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
    """The smallest integers in the proportions of some decimal numbers."""
    exact = [Fraction(str(weight)) for weight in weights]
    common = lcm(*(weight.denominator for weight in exact))
    shares = [int(weight * common) for weight in exact]
    shares = [share // gcd(*shares) for share in shares]
    if sum(shares) > LONGEST_PERIOD:
        raise InputError(
            f"data.train: the weights {', '.join(map(str, weights))} can't be kept within "
            f"{LONGEST_PERIOD:,} lines; round them"
        )
    return shares
