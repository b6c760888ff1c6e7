"""Tokenised rows, in one array however many there are."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass
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


def row(ids: Sequence[int] | np.ndarray, trained: Sequence[bool] | np.ndarray) -> Row:
    """A row of these tokens, the first of them no target."""
    mask = np.array(trained, bool)
    mask[:1] = False
    return Row(np.asarray(ids, np.int32), mask)


class Rows(Sequence[Row]):
    """Many rows: five bytes a token.

    Attributes:
      ids: int32, the tokens of all rows.
      trained: bool, as long.
      ends: int64, where each row ends in them.
    """

    def __init__(self, rows: Iterable[Row]) -> None:
        rows = list(rows)
        self.ids = np.concatenate([r.ids for r in rows] or [np.zeros(0, np.int32)])
        self.trained = np.concatenate([r.trained for r in rows] or [np.zeros(0, bool)])
        self.ends = np.cumsum([len(r) for r in rows], dtype=np.int64)

    @property
    def lengths(self) -> np.ndarray:
        """int64 [len(self)]."""
        return np.diff(self.ends, prepend=0)

    def __len__(self) -> int:
        return len(self.ends)

    @overload
    def __getitem__(self, index: int) -> Row: ...
    @overload
    def __getitem__(self, index: slice) -> list[Row]: ...
    def __getitem__(self, index: int | slice) -> Row | list[Row]:
        if isinstance(index, slice):
            return [self[i] for i in range(*index.indices(len(self)))]
        at = range(len(self))[index]
        part = slice(self.ends[at - 1] if at else 0, self.ends[at])
        return Row(self.ids[part], self.trained[part])
