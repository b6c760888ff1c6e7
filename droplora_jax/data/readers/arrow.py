"""Arrow files and streams, such as the `datasets` library saves, read in batches."""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from io import BufferedIOBase
from typing import Protocol, runtime_checkable

from droplora_jax.core.errors import InputError, first_line
from droplora_jax.data.readers.base import BATCH, Reader, Record

_MAGIC = b"ARROW1"  # the first bytes of a file; a stream begins with the length of its schema


@runtime_checkable
class Table(Protocol):
    """The part of a `pyarrow.RecordBatch` that is used here."""

    num_rows: int

    def slice(self, offset: int, length: int) -> Table: ...
    def to_pylist(self) -> list[dict[str, object]]: ...


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
            for row in batch.slice(start, BATCH).to_pylist():
                number += 1
                yield f"{name}, row {number}", row


ARROW = Reader(_records, seeks=True)
