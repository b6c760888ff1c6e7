"""Rows as files: written in chunks, and mapped into memory when they are read."""

from __future__ import annotations

import json
from collections import Counter
from collections.abc import Iterable, Sequence
from contextlib import ExitStack
from dataclasses import asdict, dataclass
from pathlib import Path

import numpy as np

from droplora_jax.data.length_limit import Tally
from droplora_jax.data.rows import Flat, Row

INFO = "info.json"
DTYPES = {
    "ids": np.dtype("<i4"),
    "trained": np.dtype("bool"),
    "ends": np.dtype("<i8"),
    "keys": np.dtype("<u8"),
}


@dataclass(frozen=True)
class Info:
    """Facts about the rows of a file, stored beside them as JSON.

    Attributes:
      format, template: the names of those that were used.
      rows, tokens: their numbers.
      trained_tokens, largest_id: see `Flat`.
      counts, lengths, empty, bad, end_markers: see `Tally`; places in the file are without its
        name.
    """

    format: str
    template: str
    rows: int
    tokens: int
    trained_tokens: int
    largest_id: int
    counts: dict[str, int]
    lengths: list[list[int]]
    empty: list[str]
    bad: list[str]
    end_markers: dict[str, int]

    def tally(self, name: str) -> Tally:
        """The tally of the file's records; the file may have another name by now."""
        lengths = Counter({length: count for length, count in self.lengths})
        empty, bad = ([name + place for place in places] for places in (self.empty, self.bad))
        return Tally(Counter(self.counts), lengths, empty, bad, Counter(self.end_markers))


class FlatWriter:
    """Writes rows into a folder; only those of one call of `add` are in memory."""

    def __init__(self, folder: Path, stack: ExitStack) -> None:
        """The files are closed with `stack`."""
        self._rows = self._tokens = self._trained_tokens = 0
        self._largest_id = -1
        self._folder = folder
        self._files = {
            name: stack.enter_context((folder / name).open("wb", buffering=2**20))
            for name in DTYPES
        }

    def add(self, texts: Iterable[Sequence[Row]]) -> None:
        """Append the rows of some texts; a text has one piece, several, or none."""
        flat = Flat.of(pieces for pieces in texts if pieces)
        arrays = {**vars(flat), "ends": flat.ends + self._tokens}
        for name, dtype in DTYPES.items():
            self._files[name].write(arrays[name].astype(dtype, copy=False).tobytes())
        self._rows += len(flat)
        self._tokens += len(flat.ids)
        self._trained_tokens += flat.trained_tokens
        self._largest_id = max(self._largest_id, flat.largest_id)

    def finish(self, name: str, format: str, template: str, tally: Tally) -> None:
        """Write the `Info` of the rows; `name` is that of the file that they come from."""
        for file in self._files.values():
            file.flush()
        info = Info(
            format=format,
            template=template,
            rows=self._rows,
            tokens=self._tokens,
            trained_tokens=self._trained_tokens,
            largest_id=self._largest_id,
            counts=dict(tally.counts),
            lengths=[[length, count] for length, count in tally.lengths.items()],
            empty=[place.removeprefix(name) for place in tally.empty],
            bad=[place.removeprefix(name) for place in tally.bad],
            end_markers=dict(tally.end_markers),
        )
        (self._folder / INFO).write_text(json.dumps(asdict(info)), encoding="utf-8")


def read(folder: Path) -> tuple[Flat, Info] | None:
    """The rows in a folder, mapped from disk; None if they are missing or incomplete."""
    try:
        info = Info(**json.loads((folder / INFO).read_text(encoding="utf-8")))
        sizes = {"ids": info.tokens, "trained": info.tokens, "ends": info.rows, "keys": info.rows}
        arrays = {name: _mapped(folder / name, DTYPES[name], size) for name, size in sizes.items()}
    except (OSError, ValueError, TypeError):
        return None
    flat = Flat(**arrays, trained_tokens=info.trained_tokens, largest_id=info.largest_id)
    return flat, info


def _mapped(file: Path, dtype: np.dtype, size: int) -> np.ndarray:
    if file.stat().st_size != size * dtype.itemsize:
        raise ValueError(f"{file} has not {size} numbers")
    if not size:
        return np.zeros(0, dtype)  # an empty file cannot be mapped
    return np.memmap(file, dtype, "r", shape=(size,))
