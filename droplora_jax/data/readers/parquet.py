"""Parquet, read in batches."""

from __future__ import annotations

from collections.abc import Iterator
from io import BufferedIOBase

from droplora_jax.core.errors import InputError, first_line
from droplora_jax.data.readers.arrow import numbered
from droplora_jax.data.readers.base import BATCH, Reader, Record


def _records(stream: BufferedIOBase, name: str) -> Iterator[Record]:
    import pyarrow
    from pyarrow.parquet import ParquetFile

    try:
        # `pre_buffer` would hold everything that is going to be read in memory.
        file = ParquetFile(stream, pre_buffer=False, buffer_size=2**20)
        yield from numbered(file.iter_batches(batch_size=BATCH), name)
    except (pyarrow.ArrowException, OSError) as error:
        raise InputError(f"{name}: not a whole Parquet file ({first_line(error)})") from error


PARQUET = Reader(_records, seeks=True)
