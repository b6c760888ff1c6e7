"""What was read, and what became of it."""

from __future__ import annotations

from dataclasses import dataclass


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
    """What `load` did.

    Attributes:
      sources: the files.
      max_length: the limit on a row's tokens.
      read: records in the files.
      kept: rows that are trained on; a text that was split counts once a piece.
      cut: of these, rows that were cut to the limit.
      split: texts that were split.
      pieces: rows that they were split into.
      dropped_long: records left out because they were longer than the limit.
      dropped_unlabelled: records left out because none of their tokens is a target.
      tokens: tokens of all kept rows.
      trained_tokens: of these, targets.
      lengths: tokens of the shortest, the median and the longest kept row.
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
    tokens: int
    trained_tokens: int
    lengths: tuple[int, int, int]

    @property
    def dropped(self) -> int:
        return self.dropped_long + self.dropped_unlabelled

    def lines(self) -> list[str]:
        """A short text for the terminal."""
        files = [
            f"{source.records:,} rows from {source.path} ({source.format}, "
            f"template {source.template})"
            for source in self.sources
        ]
        *others, last = files
        facts = [last, *self._changes(), *self._sizes()]
        return [*others, "; ".join(facts)]

    def _changes(self) -> list[str]:
        limit = f"{self.max_length:,} tokens"
        parts = [f"{self.cut:,} cut to {limit}"]
        if self.split:
            parts.append(f"{self.split:,} split into {self.pieces:,} of at most {limit}")
        why = []
        if self.dropped_long:
            why.append(f"{self.dropped_long:,} of more than {limit}")
        if self.dropped_unlabelled:
            why.append(f"{self.dropped_unlabelled:,} with no response within {limit}")
        return [*parts, f"{self.dropped:,} dropped" + (f" ({', '.join(why)})" if why else "")]

    def _sizes(self) -> list[str]:
        lengths = " / ".join(f"{length:,}" for length in self.lengths)
        return [
            f"lengths {lengths} (min / median / max)",
            f"{self.trained_tokens / self.tokens:.0%} of {self.tokens:,} tokens are trained",
        ]
