"""Tokenised examples (rows), stored together in a few arrays."""

from __future__ import annotations

import hashlib
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from functools import cached_property
from typing import overload

import numpy as np


@dataclass(frozen=True)
class Row:
    """One tokenised example.

    Attributes:
      ids: int32 [n], the tokens.
      trained: bool [n], whether a token is a target. The first never is: nothing predicts it.
    """

    ids: np.ndarray
    trained: np.ndarray

    def __len__(self) -> int:
        return len(self.ids)

    def first(self, n: int) -> Row:
        return Row(self.ids[:n], self.trained[:n])

    def split(self, n: int) -> list[Row]:
        """Pieces of at most `n` >= 2 tokens. Each target of the row is a target in one piece.

        Each piece but the first begins with the last token of the piece before, which predicts
        the second token and is not a target again.
        """
        starts = range(0, max(len(self) - 1, 1), n - 1)
        return [row(self.ids[at : at + n], self.trained[at : at + n]) for at in starts]

    @property
    def key(self) -> int:
        """A 64-bit hash of the tokens."""
        digest = hashlib.blake2b(self.ids.tobytes(), digest_size=8).digest()
        return int.from_bytes(digest, "little")


def row(ids: Sequence[int] | np.ndarray, trained: Sequence[bool] | np.ndarray) -> Row:
    """A row of these tokens, of which the first is not a target."""
    mask = np.array(trained, bool)
    mask[:1] = False
    return Row(np.asarray(ids, np.int32), mask)


@dataclass(frozen=True)
class Flat:
    """The rows of one file, in five bytes a token and sixteen a row.

    Attributes:
      ids: int32 [tokens], the tokens of all rows.
      trained: bool [tokens], whether they are targets.
      ends: int64 [rows], where each row ends in `ids`.
      keys: uint64 [rows], a hash of the text that the row comes from; pieces of a text share it.
      trained_tokens: the number of targets.
      largest_id: the largest token id; -1 without a token.
    """

    ids: np.ndarray
    trained: np.ndarray
    ends: np.ndarray
    keys: np.ndarray
    trained_tokens: int
    largest_id: int

    @staticmethod
    def of(texts: Iterable[Sequence[Row]]) -> Flat:
        """The rows of some texts, each with one piece or several."""
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
    """The rows of several files, one after the other, or a selection of them.

    Attributes:
      sources: the files, grouped by the entry of `data.train` that names them.
      chosen: int64, ascending indices of the rows that are selected; None for all.
    """

    def __init__(self, sources: Sequence[Sequence[Flat]], chosen: np.ndarray | None = None) -> None:
        self.sources, self.chosen = sources, chosen
        self._flats = [flat for source in sources for flat in source]
        self._stops = np.cumsum([len(flat) for flat in self._flats], dtype=np.int64)

    @staticmethod
    def of(rows: Iterable[Row]) -> Rows:
        """Rows from memory, as one source."""
        return Rows([[Flat.of([row] for row in rows)]])

    def only(self, chosen: np.ndarray) -> Rows:
        """A selection of these rows by ascending indices."""
        return Rows(self.sources, chosen if self.chosen is None else self.chosen[chosen])

    @property
    def counts(self) -> list[int]:
        """The number of rows of each source."""
        stops = np.cumsum([sum(map(len, source)) for source in self.sources])
        if self.chosen is not None:
            stops = np.searchsorted(self.chosen, stops)
        return np.diff(stops, prepend=0).tolist()

    @cached_property
    def lengths(self) -> np.ndarray:
        """int64 [len(self)], the tokens of each row."""
        return self._gather([np.diff(flat.ends, prepend=0) for flat in self._flats], np.int64)

    @property
    def keys(self) -> np.ndarray:
        """uint64 [len(self)], see `Flat`."""
        return self._gather([flat.keys for flat in self._flats], np.uint64)

    @property
    def trained_tokens(self) -> int:
        """The number of targets in all rows of the sources, selected or not."""
        return sum(flat.trained_tokens for flat in self._flats)

    @property
    def largest_id(self) -> int:
        """The largest token id of the sources."""
        return max(flat.largest_id for flat in self._flats)

    def _gather(self, parts: list[np.ndarray], dtype: type) -> np.ndarray:
        values = np.concatenate([np.zeros(0, dtype), *parts])
        return values if self.chosen is None else values[self.chosen]

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
