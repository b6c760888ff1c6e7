"""CSV and TSV: the first line names the columns, and every value is text."""

from __future__ import annotations

import csv
import re
import threading
from collections.abc import Iterator
from functools import partial
from io import BufferedIOBase
from itertools import chain

from droplora_jax.core.errors import InputError
from droplora_jax.data.readers.base import LONGEST, Read, Reader, decoded, lines

_FIELD_SIZE_LIMIT = threading.Lock()  # held while csv's limit is another than the process's
_DELIMITERS = ",;\t|"
_STATED = re.compile(r'"?sep=(.)"?\s*')  # a first line that spreadsheets write


def _records(stream: BufferedIOBase, name: str, *, delimiter: str) -> Iterator[Read]:
    texts = (decoded(line, name, number) for number, line in lines(stream, name))
    first = next(texts, "")
    if stated := _STATED.fullmatch(first):
        delimiter, first = stated[1], ""  # an empty line is passed over
    else:
        delimiter = _delimiter(first, delimiter)
    rows = csv.reader(chain([first], texts), delimiter=delimiter, strict=True)
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
        elif problem := _problem(row, columns):
            yield where, InputError(f"{where}: {problem}")
        else:
            named = zip(columns, row, strict=True)
            yield where, {column: value for column, value in named if column}


def _delimiter(first: str, usual: str) -> str:
    """What stands between the names of the first line: the usual one, if it is there at all."""

    def names(delimiter: str) -> int:
        return len(next(csv.reader([first], delimiter=delimiter), []))

    return usual if names(usual) > 1 else max(usual + _DELIMITERS, key=names)


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
    """The names of the columns. One without a name is not read: pandas writes its index so."""
    columns = [column.strip() for column in columns]
    for column in columns:
        if (column and columns.count(column) > 1) or not any(columns):
            raise InputError(
                f"{where}: the first line must name the columns, each once, and holds {column!r}"
            )
    return columns


def _problem(row: list[str], columns: list[str]) -> str:
    """What is wrong with a row; empty if nothing is."""
    if len(row) != len(columns):
        return (
            f"{len(row)} values, but the first line names {len(columns)} columns "
            f"({', '.join(columns)})"
        )
    if [value.strip() for value in row] == columns:
        return "this row repeats the names of the columns; were several files joined?"
    return ""


CSV = Reader(partial(_records, delimiter=","), text=True)
TSV = Reader(partial(_records, delimiter="\t"), text=True)
