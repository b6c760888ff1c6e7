"""What was read from the files, and how many records were kept, cut, split or dropped."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from os.path import basename

_FILES = 8  # files that get a line each; the others share one
_QUANTILES = {"min": 0.0, "50%": 0.5, "90%": 0.9, "99%": 0.99, "max": 1.0}


@dataclass(frozen=True)
class Source:
    """One file: its format and template, its records, and the SHA-256 of its bytes."""

    path: str
    format: str
    template: str
    records: int
    sha256: str


@dataclass(frozen=True)
class Report:
    """What `load` read, kept and dropped.

    Attributes:
      sources: the files.
      max_length: the limit on a row's tokens.
      read: the number of records in the files.
      kept: rows that are trained on; each piece of a split text counts.
      cut: kept rows that were cut to the limit.
      split: texts that were split.
      pieces: rows that they were split into.
      dropped_long: records left out because they were longer than the limit.
      dropped_unlabelled: records left out because none of their tokens is a target.
      dropped_empty: records left out because one of their texts is empty.
      dropped_bad: records left out because they are not as they should be.
      has_bos: records whose text begins with BOS, so that it was not put before them.
      has_eos: records whose text ends with EOS, so that it was not put behind them.
      empty: the places of the first empty records, and the key that is empty.
      bad: the places of the first records that are not as they should be, and what is wrong.
      tokens: tokens of all kept rows.
      trained_tokens: tokens of all kept rows that are targets.
      lengths: (tokens, number of records) by tokens, before records were cut, split or dropped.
      end_markers: the texts that end answers.
      unended: records in which the chat template writes nothing that ends an answer.
      unprompted: records whose last answer does not follow the chat template's prompt for one.
    """

    sources: tuple[Source, ...]
    max_length: int
    read: int
    kept: int
    cut: int
    split: int
    pieces: int
    dropped_long: int
    dropped_unlabelled: int
    dropped_empty: int
    dropped_bad: int
    has_bos: int
    has_eos: int
    empty: tuple[str, ...]
    bad: tuple[str, ...]
    tokens: int
    trained_tokens: int
    lengths: tuple[tuple[int, int], ...]
    end_markers: tuple[str, ...] = ()
    unended: int = 0
    unprompted: int = 0

    @property
    def dropped(self) -> int:
        left_out = self.dropped_long + self.dropped_unlabelled + self.dropped_empty
        return left_out + self.dropped_bad

    def lines(self) -> list[str]:
        """A short text for the terminal."""
        return [
            *self._files(),
            "; ".join(self._changes()),
            *self._bad(),
            *self._written_out(),
            f"{self.trained_tokens / self.tokens:.0%} of {self.tokens:,} tokens are trained",
            self._lengths(),
        ]

    def _files(self) -> list[str]:
        shown, more = self.sources[:_FILES], self.sources[_FILES:]
        lines = [
            f"{many(s.records, 'row')} from {s.path} ({s.format}, template {s.template})"
            for s in shown
        ]
        if more:
            rows = many(sum(s.records for s in more), "row")
            lines.append(f"{rows} from {many(len(more), 'more file')}")
        return lines

    def _lengths(self) -> str:
        values = (f"{quantile(self.lengths, part):,}" for part in _QUANTILES.values())
        long = sum(records for length, records in self.lengths if length > self.max_length)
        return (
            f"lengths in tokens: {' / '.join(values)} ({' / '.join(_QUANTILES)}), "
            f"{long:,} above max_length={self.max_length}"
        )

    def _bad(self) -> list[str]:
        """A line for each row that was left out because it is not as it should be."""
        lines = []
        for problem in self.bad:
            place, separator, reason = problem.partition(": ")
            lines.append(f"left out: {basename(place)}{separator}{reason}")
        if more := self.dropped_bad - len(self.bad):
            lines.append(f"left out: {many(more, 'more row')}")
        return lines

    def _written_out(self) -> list[str]:
        """How many rows hold the special tokens that others get."""
        counts = {"BOS": self.has_bos, "EOS": self.has_eos}
        parts = [f"{name} in {many(count, 'row')}" for name, count in counts.items() if count]
        return [f"written out already and not added again: {', '.join(parts)}"] if parts else []

    def _changes(self) -> list[str]:
        limit = f"{self.max_length:,} tokens"
        parts = [f"{many(self.kept, 'row')} to train on", f"{self.cut:,} cut to {limit}"]
        if self.split:
            parts.append(f"{self.split:,} split into {self.pieces:,} of at most {limit}")
        why = []
        if self.dropped_long:
            why.append(f"{self.dropped_long:,} of more than {limit}")
        if self.dropped_unlabelled:
            why.append(f"{self.dropped_unlabelled:,} with no response within {limit}")
        if self.dropped_empty:
            more = ", ..." if self.dropped_empty > len(self.empty) else ""
            places = ", ".join(basename(place) for place in self.empty)
            why.append(f"{self.dropped_empty:,} empty: {places}{more}")
        if self.dropped_bad:
            why.append(f"{self.dropped_bad:,} not as they should be")
        return [*parts, f"{self.dropped:,} dropped" + (f" ({'; '.join(why)})" if why else "")]


def quantile(counts: Sequence[tuple[int, int]], part: float) -> int:
    """The least value with at least `part` of all values at or below it.

    Args:
      counts: (value, how often it occurs), sorted by value.
      part: from 0 to 1.
    """
    left = part * sum(n for _, n in counts)
    for value, n in counts:
        left -= n
        if left <= 0:
            return value
    raise ValueError("there is no value")


def many(count: int, what: str) -> str:
    """The count with its noun."""
    return f"{count:,} {what}{'' if count == 1 else 's'}"
