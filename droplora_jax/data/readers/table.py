"""CSV and TSV: the first line names the columns, and every value is text."""

from __future__ import annotations

import csv
import threading
from collections.abc import Iterator
from functools import partial
from io import BufferedIOBase

from droplora_jax.core.errors import InputError
from droplora_jax.data.readers.base import LONGEST, Reader, Record, lines

_FIELD_SIZE_LIMIT = threading.Lock()  # held while csv's limit is another than the process's


def _records(stream: BufferedIOBase, name: str, *, delimiter: str) -> Iterator[Record]:
    rows = csv.reader((text for _, text in lines(stream, name)), delimiter=delimiter, strict=True)
    begin, columns = 1, None
    while True:
        where = f"{name}:{begin}"
        try:
            row = _next(rows)
        except csv.Error as error:
            raise InputError(f"{where}: the row that begins here is broken ({error})") from error
        begin = rows.line_num + 1
        if row is None:
            return
        if not row:
            continue
        if columns is None:
            columns = _checked(where, row)
        elif len(row) != len(columns):
            raise InputError(
                f"{where}: {len(row)} values, but the first line names {len(columns)} columns "
                f"({', '.join(columns)})"
            )
        else:
            yield where, dict(zip(columns, row, strict=True))


def _next(rows: Iterator[list[str]]) -> list[str] | None:
    """The next row, with values of up to `LONGEST` characters; None at the end."""
    # The limit holds for the whole process, 128 KiB by default: it is put back after each row.
    with _FIELD_SIZE_LIMIT:
        before = csv.field_size_limit(LONGEST)
        try:
            return next(rows, None)
        finally:
            csv.field_size_limit(before)


def _checked(where: str, columns: list[str]) -> list[str]:
    columns = [column.strip() for column in columns]
    for column in columns:
        if not column or columns.count(column) > 1:
            raise InputError(
                f"{where}: the first line must name the columns, each once, and holds {column!r}"
            )
    return columns


CSV = Reader(partial(_records, delimiter=","))
TSV = Reader(partial(_records, delimiter="\t"))
