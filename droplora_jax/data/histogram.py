"""How long the records are, as bars of text."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from itertools import count
from typing import NamedTuple

_BARS, _WIDTH = 10, 32
_MOST = 0.95  # of the records are told apart, however long


class Bar(NamedTuple):
    """Records of `low` to `high` tokens; without `high`, of at least `low`."""

    low: int
    high: int | None
    records: int


def bars(lengths: Mapping[int, int], limit: int) -> list[Bar]:
    """At most ten bars of one round width, and one of what is longer than most and the limit.

    Args:
      lengths: how many records have each number of tokens.
      limit: tokens of a line.
    """
    counts = sorted(lengths.items())
    least, longest = counts[0][0], counts[-1][0]
    top = min(max(limit, quantile(counts, _MOST)), longest)
    width = _round_width(least, top)
    found = []
    for low in range(least // width * width, top + 1, width):
        high = min(low + width - 1, top)
        found.append(Bar(low, high, sum(n for length, n in counts if low <= length <= high)))
    more = sum(n for length, n in counts if length > top)
    return [*found, Bar(top + 1, None, more)] if more else found


def drawn(found: Sequence[Bar], limit: int) -> list[str]:
    """A line of text a bar, with a mark at the limit if there are records beyond it."""
    most = max(bar.records for bar in found)
    names = [f"{low:,} - {high:,}" if high else f"{low:,} and more" for low, high, _ in found]
    wide = max(map(len, names))
    lines = []
    for name, bar in zip(names, found, strict=True):
        here = bar.high is not None and bar.low <= limit <= bar.high
        beyond = bar is not found[-1] or limit != bar.high
        mark = f"  < max_length={limit}" if here and beyond else ""
        lines.append(f"  {name:>{wide}}  {_bar(bar.records / most)}  {bar.records:,}{mark}")
    return lines


def quantile(counts: Sequence[tuple[int, int]], part: float) -> int:
    """The least value that `part` of all are not above; of (value, how often), sorted by value."""
    left = part * sum(n for _, n in counts)
    for value, n in counts:
        left -= n
        if left <= 0:
            return value
    raise ValueError("there is no value")


def _bar(part: float) -> str:
    length = round(part * _WIDTH)
    return ("█" * length if length else "▏" if part else "").ljust(_WIDTH)


def _round_width(least: int, most: int) -> int:
    """The smallest of 1, 2, 5, 10, 20, ... of which few enough reach from one to the other."""
    widths = (digit * 10**power for power in count() for digit in (1, 2, 5))
    return next(w for w in widths if most // w - least // w < _BARS)
