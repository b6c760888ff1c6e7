"""Cuts, splits or drops rows that are too long, and counts what happened to them."""

from __future__ import annotations

from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass, field

from droplora_jax.core.errors import InputError
from droplora_jax.data.config import DataConfig
from droplora_jax.data.formats.base import Empty
from droplora_jax.data.report import Report, Source
from droplora_jax.data.rows import Row, Rows

_NAMED = 3  # empty records whose places are reported
_NAMED_BAD = 20  # bad rows that are reported with what is wrong with them


@dataclass
class Tally:
    """Counts of what happened to the records so far.

    Attributes:
      counts: the records that were cut, split and dropped, by these names.
      lengths: the number of records of each length in tokens, before any was changed.
      empty: the places of the first records with an empty text.
      bad: the first rows that were left out because they are not as they should be: place and
        reason.
      end_markers: the texts that end answers, and how many records have each; those without any
        are counted under an empty text.
    """

    counts: Counter[str] = field(default_factory=Counter)
    lengths: Counter[int] = field(default_factory=Counter)
    empty: list[str] = field(default_factory=list)
    bad: list[str] = field(default_factory=list)
    end_markers: Counter[str] = field(default_factory=Counter)

    @property
    def read(self) -> int:
        """Records so far, kept or not."""
        dropped = self.counts["dropped_empty"] + self.counts["dropped_bad"]
        return self.lengths.total() + dropped

    def add(self, other: Tally) -> None:
        self.counts.update(other.counts)
        self.lengths.update(other.lengths)
        self.empty = [*self.empty, *other.empty][:_NAMED]
        self.bad = [*self.bad, *other.bad][:_NAMED_BAD]
        self.end_markers.update(other.end_markers)

    def report(self, rows: Rows, sources: tuple[Source, ...], limit: int) -> Report:
        """The report of the rows that are kept.

        Raises:
          InputError: no row is kept.
        """
        if not len(rows):
            raise InputError(self._none_left(sources, limit))
        counts = self.counts
        return Report(
            sources=sources,
            max_length=limit,
            read=self.read,
            kept=len(rows),
            cut=counts["cut"],
            split=counts["split"],
            pieces=counts["pieces"],
            dropped_long=counts["dropped_long"],
            dropped_unlabelled=counts["dropped_unlabelled"],
            dropped_empty=counts["dropped_empty"],
            dropped_bad=counts["dropped_bad"],
            has_bos=counts["has_bos"],
            has_eos=counts["has_eos"],
            empty=tuple(self.empty),
            bad=tuple(self.bad),
            tokens=int(rows.lengths.sum()),
            trained_tokens=rows.trained_tokens,
            lengths=tuple(sorted(self.lengths.items())),
            end_markers=tuple(marker for marker in self.end_markers if marker),
            unended=self.end_markers[""],
            unprompted=counts["unprompted"],
        )

    def _none_left(self, sources: Sequence[Source], limit: int) -> str:
        counts = self.counts
        paths = ", ".join(source.path for source in sources)
        why = []
        if counts["dropped_long"]:
            why.append(f"{counts['dropped_long']:,} are longer than data.max_length={limit}")
        if counts["dropped_unlabelled"]:
            why.append(
                f"{counts['dropped_unlabelled']:,} have nothing to learn within "
                f"data.max_length={limit}"
            )
        if counts["dropped_empty"]:
            why.append(f"{counts['dropped_empty']:,} are empty ({', '.join(self.empty)})")
        if counts["dropped_bad"]:
            why.append(f"{counts['dropped_bad']:,} are not as they should be ({self.bad[0]})")
        whatever_the_limit = counts["dropped_empty"] + counts["dropped_bad"]
        fix = "" if whatever_the_limit == self.read else "; raise data.max_length"
        return f"{paths}: no row is left to train on: {', '.join(why)}{fix}"


def fit(row: Row, where: str, splittable: bool, config: DataConfig, tally: Tally) -> list[Row]:
    """The row as one or several of at most `max_length` tokens, or none; counted in `tally`."""
    limit, counts = config.max_length, tally.counts
    tally.lengths[len(row)] += 1
    long = len(row) > limit
    if long and splittable:
        pieces = row.split(limit)
        counts["split"] += 1
        counts["pieces"] += len(pieces)
        return pieces
    if long and config.too_long == "error":
        raise InputError(
            f"{where}: {len(row):,} tokens are more than data.max_length={limit}; raise it, or set "
            "data.too_long to cut or drop"
        )
    if long and config.too_long == "drop":
        counts["dropped_long"] += 1
        return []
    row = row.first(limit)
    if not row.trained.any():
        counts["dropped_unlabelled"] += 1
        return []
    counts["cut"] += long
    return [row]


def drop_empty(where: str, error: Empty, config: DataConfig, tally: Tally) -> None:
    """Count a record without a text, unless that is an error."""
    if config.empty == "error":
        raise InputError(f"{where}: {error}, or set data.empty=drop") from error
    tally.counts["dropped_empty"] += 1
    if len(tally.empty) < _NAMED:
        tally.empty.append(f"{where}: {error.key}")


def drop_bad(error: InputError, tally: Tally) -> None:
    """Count a row that is not as it should be; the error names its place."""
    tally.counts["dropped_bad"] += 1
    if len(tally.bad) < _NAMED_BAD:
        tally.bad.append(str(error))
