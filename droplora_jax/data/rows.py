"""Tokenised rows, in a few arrays however many there are."""

from __future__ import annotations

import hashlib
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from functools import cached_property
from typing import overload

import numpy as np


@dataclass(frozen=True)
class Row:
    """One document.

    Attributes:
      ids: int32 [n], the tokens.
      trained: bool [n], whether a token is a target. Never the first: nothing precedes it.
    """

    ids: np.ndarray
    trained: np.ndarray

    def __len__(self) -> int:
        return len(self.ids)

    def first(self, n: int) -> Row:
        return Row(self.ids[:n], self.trained[:n])

    def split(self, n: int) -> list[Row]:
        """Pieces of at most `n` >= 2 tokens. A target of the row is a target of one piece.

        Each piece but the first begins with the last token of the one before, which predicts the
        piece's first target and is no target there.
        """
        starts = range(0, max(len(self) - 1, 1), n - 1)
        return [row(self.ids[at : at + n], self.trained[at : at + n]) for at in starts]

    @property
    def key(self) -> int:
        """64 bits of a hash of the tokens: equal rows have equal ones."""
        digest = hashlib.blake2b(self.ids.tobytes(), digest_size=8).digest()
        return int.from_bytes(digest, "little")


def row(ids: Sequence[int] | np.ndarray, trained: Sequence[bool] | np.ndarray) -> Row:
    """A row of these tokens, the first of them no target."""
    mask = np.array(trained, bool)
    mask[:1] = False
    return Row(np.asarray(ids, np.int32), mask)


@dataclass(frozen=True)
class Flat:
    """The rows of one file: five bytes a token and sixteen a row.

    Attributes:
      ids: int32, the tokens of all rows.
      trained: bool, as long.
      ends: int64, where each row ends in them.
      keys: uint64 [rows], of the text that a row is of: pieces of one text have one key.
      trained_tokens: how many of the tokens are targets.
      largest_id: the largest token; -1 without any.
    """

    ids: np.ndarray
    trained: np.ndarray
    ends: np.ndarray
    keys: np.ndarray
    trained_tokens: int
    largest_id: int

    @staticmethod
    def of(texts: Iterable[Sequence[Row]]) -> Flat:
        """The rows of some texts, each of one piece or several."""
        texts = [list(pieces) for pieces in texts]
        rows = [row for pieces in texts for row in pieces]
        ids = np.concatenate([r.ids for r in rows] or [np.zeros(0, np.int32)])
        trained = np.concatenate([r.trained for r in rows] or [np.zeros(0, bool)])
        return Flat(
            ids=ids,
            trained=trained,
            ends=np.cumsum([len(r) for r in rows], dtype=np.int64),
            keys=np.array([pieces[0].key for pieces in texts for _ in pieces], np.uint64),
            trained_tokens=int(np.count_nonzero(trained)),
            largest_id=int(ids.max(initial=-1)),
        )

    def __len__(self) -> int:
        return len(self.ends)

    def __getitem__(self, index: int) -> Row:
        part = slice(self.ends[index - 1] if index else 0, self.ends[index])
        return Row(self.ids[part], self.trained[part])


class Rows(Sequence[Row]):
    """The rows of several files, one after the other, or some of them.

    Attributes:
      sources: the files, grouped by the entry of `data.train` that names them.
      chosen: int64, rising: which of the rows these are; None for all.
    """

    def __init__(self, sources: Sequence[Sequence[Flat]], chosen: np.ndarray | None = None) -> None:
        self.sources, self.chosen = sources, chosen
        self._flats = [flat for source in sources for flat in source]
        self._stops = np.cumsum([len(flat) for flat in self._flats], dtype=np.int64)

    @staticmethod
    def of(rows: Iterable[Row]) -> Rows:
        """Rows that are in memory."""
        return Rows([[Flat.of([row] for row in rows)]])

    def only(self, chosen: np.ndarray) -> Rows:
        """Some of these rows by their indices, which rise."""
        return Rows(self.sources, chosen if self.chosen is None else self.chosen[chosen])

    @property
    def counts(self) -> list[int]:
        """How many rows each source has."""
        stops = np.cumsum([sum(map(len, source)) for source in self.sources])
        if self.chosen is not None:
            stops = np.searchsorted(self.chosen, stops)
        return np.diff(stops, prepend=0).tolist()

    @cached_property
    def lengths(self) -> np.ndarray:
        """int64 [len(self)]."""
        return self._gather([np.diff(flat.ends, prepend=0) for flat in self._flats], np.int64)

    @property
    def keys(self) -> np.ndarray:
        """uint64 [len(self)], see `Flat`."""
        return self._gather([flat.keys for flat in self._flats], np.uint64)

    @property
    def trained_tokens(self) -> int:
        """Targets of all rows of the sources."""
        return sum(flat.trained_tokens for flat in self._flats)

    @property
    def largest_id(self) -> int:
        """The largest token of the sources."""
        return max(flat.largest_id for flat in self._flats)

    def _gather(self, parts: list[np.ndarray], dtype: type) -> np.ndarray:
        whole = np.concatenate([np.zeros(0, dtype), *parts])
        return whole if self.chosen is None else whole[self.chosen]

    def __len__(self) -> int:
        if self.chosen is not None:
            return len(self.chosen)
        return int(self._stops[-1]) if len(self._stops) else 0

    @overload
    def __getitem__(self, index: int) -> Row: ...
    @overload
    def __getitem__(self, index: slice) -> list[Row]: ...
    def __getitem__(self, index: int | slice) -> Row | list[Row]:
        if isinstance(index, slice):
            return [self[i] for i in range(*index.indices(len(self)))]
        at = range(len(self))[index]
        if self.chosen is not None:
            at = int(self.chosen[at])
        number = int(np.searchsorted(self._stops, at, side="right"))
        return self._flats[number][at - int(self._stops[number - 1] if number else 0)]
