"""Arrow files and streams, such as the `datasets` library saves, read in batches."""

from __future__ import annotations

import json
from collections.abc import Callable, Iterable, Iterator, Mapping
from io import BufferedIOBase
from typing import TYPE_CHECKING, Protocol, runtime_checkable

from droplora_jax.core.errors import InputError, first_line
from droplora_jax.data.readers.base import BATCH, Reader, Record

if TYPE_CHECKING:
    import pyarrow

# Besides the errors of Arrow itself, for a value that has no counterpart in Python, and for JSON.
_UNREADABLE = (ArithmeticError, ValueError, ImportError, RecursionError)
_MAGIC = b"ARROW1"  # the first bytes of a file; a stream begins with the length of its schema


@runtime_checkable
class Table(Protocol):
    """The part of a `pyarrow.RecordBatch` that is used here."""

    num_rows: int
    schema: pyarrow.Schema

    def slice(self, offset: int, length: int) -> Table: ...
    def column(self, name: str) -> pyarrow.Array: ...


def _records(stream: BufferedIOBase, name: str) -> Iterator[Record]:
    import pyarrow

    try:
        magic = stream.read(len(_MAGIC))
        stream.seek(0)
        yield from numbered(_batches(stream, magic == _MAGIC), name)
    except (pyarrow.ArrowException, OSError) as error:
        raise InputError(
            f"{name}: not a whole Arrow file or stream ({first_line(error)})"
        ) from error


def _batches(stream: BufferedIOBase, whole_file: bool) -> Iterator[Table]:
    from pyarrow import ipc

    if whole_file:
        file = ipc.open_file(stream)
        yield from (file.get_batch(i) for i in range(file.num_record_batches))
    else:
        yield from ipc.open_stream(stream)


def numbered(batches: Iterable[Table], name: str) -> Iterator[Record]:
    """The rows of Arrow batches as records, numbered from 1."""
    number = 0
    for batch in batches:
        for start in range(0, batch.num_rows, BATCH):
            columns = Columns(batch.slice(start, BATCH))
            for index in range(columns.rows):
                number += 1
                yield f"{name}, row {number}", Row(columns, index)


class Columns:
    """The columns of a part of a table, each converted to Python when it is first read.

    Many tables hold columns that no format reads, and some of their values (times in nanoseconds,
    dates after the year 9999) have no counterpart in Python.
    """

    def __init__(self, table: Table) -> None:
        self.names: list[str] = table.schema.names
        self.rows = table.num_rows
        self._table = table
        self._values: dict[str, list[object]] = {}

    def values(self, name: str) -> list[object]:
        """The values of a column.

        Raises:
          InputError: a value has no counterpart in Python, or two columns have this name.
        """
        if name not in self._values:
            self._values[name] = self._converted(name)
        return self._values[name]

    def _converted(self, name: str) -> list[object]:
        import pyarrow

        if self.names.count(name) > 1:
            raise InputError(f"the table has {self.names.count(name)} columns of the name {name}")
        column = self._table.column(name)
        finish = _finisher(column.type)
        try:
            values = column.to_pylist()
            return [finish(value) for value in values] if finish else values
        except (pyarrow.ArrowException, *_UNREADABLE) as error:
            raise InputError(
                f"the column {name} of {column.type} holds a value that can't be read "
                f"({first_line(error)})"
            ) from error


class Row(Mapping[str, object]):
    """One row of a table."""

    def __init__(self, columns: Columns, index: int) -> None:
        self._columns, self._index = columns, index

    def __getitem__(self, name: str) -> object:
        if name not in self._columns.names:
            raise KeyError(name)
        return self._columns.values(name)[self._index]

    def __contains__(self, name: object) -> bool:
        return name in self._columns.names  # without converting the column

    def __iter__(self) -> Iterator[str]:
        return iter(self._columns.names)

    def __len__(self) -> int:
        return len(self._columns.names)


Finish = Callable[[object], object]


def _finisher(kind: pyarrow.DataType) -> Finish | None:
    """What remains to be done to a value of a type, as `to_pylist` gives it; None for nothing.

    All objects of a column have the same fields, so that a field which a row never had is null:
    such fields are left out. JSON is parsed.
    """
    import pyarrow

    if isinstance(kind, pyarrow.JsonType):
        return lambda value: json.loads(value) if isinstance(value, str) else value
    if pyarrow.types.is_struct(kind):
        fields = {kind[i].name: _finisher(kind[i].type) for i in range(kind.num_fields)}
        return lambda value: _without_nulls(value, fields)
    if hasattr(kind, "value_type") and not pyarrow.types.is_dictionary(kind):
        finish = _finisher(kind.value_type)
        if finish is not None:
            return lambda value: _each(value, finish)
    return None


def _without_nulls(value: object, fields: Mapping[str, Finish | None]) -> object:
    if not isinstance(value, dict):
        return value
    present = ((key, item) for key, item in value.items() if item is not None)
    return {key: finish(item) if (finish := fields[key]) else item for key, item in present}


def _each(value: object, finish: Finish) -> object:
    return [finish(item) for item in value] if isinstance(value, list) else value


ARROW = Reader(_records, seeks=True)
