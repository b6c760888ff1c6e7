"""Data files: their records, unpacked while they are read, and their hashes."""

from __future__ import annotations

import bz2
import codecs
import gzip
import hashlib
import io
import lzma
import shutil
import tempfile
import zlib
from collections.abc import Callable, Iterator
from contextlib import ExitStack
from dataclasses import dataclass
from io import BufferedIOBase
from pathlib import Path
from typing import Any, cast

from droplora_jax.core.errors import InputError
from droplora_jax.data.readers import READERS
from droplora_jax.data.readers.base import Read, Reader, Record, next_bytes

Unpack = Callable[[BufferedIOBase], BufferedIOBase]


def _zstandard(stream: BufferedIOBase) -> BufferedIOBase:
    import pyarrow

    # Unlike the zstandard package, pyarrow raises an error for a file that was cut short.
    unpacked: Any = pyarrow.CompressedInputStream(stream, "zstd")
    return io.BufferedReader(unpacked, 2**20)


UNPACKERS: dict[str, Unpack] = {
    ".gz": lambda stream: gzip.GzipFile(fileobj=stream),
    ".bz2": bz2.BZ2File,
    ".xz": lambda stream: lzma.LZMAFile(stream),  # type: ignore[arg-type]  # noqa: SIM115
    ".zst": _zstandard,
}
KNOWN = f"{', '.join(READERS)}, or one of them packed as {', '.join(UNPACKERS)}"


# The first bytes of texts in other encodings; those of UTF-32 begin with those of UTF-16.
_MARKS = {
    codecs.BOM_UTF32_LE: "utf-32",
    codecs.BOM_UTF32_BE: "utf-32",
    codecs.BOM_UTF16_LE: "utf-16",
    codecs.BOM_UTF16_BE: "utf-16",
}


def _marked_encoding(beginning: bytes) -> str | None:
    """The encoding whose mark a text begins with; None without one."""
    return next((name for mark, name in _MARKS.items() if beginning.startswith(mark)), None)


@dataclass(frozen=True)
class File:
    """A data file that is on this machine.

    Attributes:
      name: the name or URL that the user gave.
      path: the local file.
    """

    name: str
    path: Path

    @property
    def suffix(self) -> str:
        """The ending of the name that decides how the file is read, such as `.jsonl`."""
        return data_suffix(self.path.name)

    def sha256(self) -> str:
        """The SHA-256 of the bytes on disk, packed if they are packed."""
        with self._open() as stream:
            return hashlib.file_digest(stream, "sha256").hexdigest()  # type: ignore[arg-type]

    def records(self) -> Iterator[Record]:
        """The records, each with its place: "a.jsonl:17" or "a.parquet, row 17".

        Raises:
          InputError: names the file, the line and the rule.
        """
        for where, record in self.read():
            if isinstance(record, InputError):
                raise record
            yield where, record

    def read(self) -> Iterator[Read]:
        """The records with their places; an error in the place of one that is not as it should be.

        Raises:
          InputError: the file can't be read any further.
        """
        empty = True
        with ExitStack() as stack:
            try:
                for record in self._reader.records(self._stream(stack), self.name):
                    empty = False
                    yield record
            except (OSError, EOFError, zlib.error, lzma.LZMAError) as error:
                kind = self.path.suffix.lower()
                what = f"not a whole {kind} file" if kind in UNPACKERS else "can't be read"
                raise InputError(f"{self.name}: {what} ({error})") from error
        if empty:
            raise InputError(f"{self.name}: the file is empty")

    @property
    def _reader(self) -> Reader:
        if self.suffix not in READERS:
            raise InputError(f"{self.name}: must be one of {KNOWN}")
        return READERS[self.suffix]

    def _open(self) -> BufferedIOBase:
        try:
            return self.path.open("rb")
        except FileNotFoundError as error:
            raise InputError(f"{self.name}: no such file") from error
        except OSError as error:
            raise InputError(f"{self.name}: can't be read ({error.strerror})") from error

    def _stream(self, stack: ExitStack) -> BufferedIOBase:
        stream = self._unpacked(stack)
        return self._as_utf8(stream, stack) if self._reader.text else stream

    def _unpacked(self, stack: ExitStack) -> BufferedIOBase:
        raw = stack.enter_context(self._open())
        unpack = UNPACKERS.get(self.path.suffix.lower())
        if unpack is None:
            return raw
        stream = stack.enter_context(unpack(raw))
        if not self._reader.seeks:
            return stream
        unpacked = stack.enter_context(tempfile.TemporaryFile())  # noqa: SIM115
        shutil.copyfileobj(stream, unpacked, 2**20)
        unpacked.seek(0)
        return cast(BufferedIOBase, unpacked)

    def _as_utf8(self, stream: BufferedIOBase, stack: ExitStack) -> BufferedIOBase:
        """The stream of a text, as UTF-8 also where its first bytes say that it is UTF-16 or 32."""
        encoding = _marked_encoding(next_bytes(stream))
        if encoding is None:
            return stream
        recoded = stack.enter_context(tempfile.TemporaryFile())  # noqa: SIM115
        try:
            text = io.TextIOWrapper(stream, encoding, newline="")  # type: ignore[type-var]
            while part := text.read(2**20):
                recoded.write(part.encode())
            text.detach()  # else the stream would be closed with it
        except UnicodeError as error:
            raise InputError(
                f"{self.name}: begins as {encoding.upper()} and is not ({error}); save it as UTF-8"
            ) from error
        recoded.seek(0)
        return cast(BufferedIOBase, recoded)


def data_suffix(name: str) -> str:
    """The ending of a file's name, without that of the packing."""
    path = Path(name.lower())
    return path.with_suffix("").suffix if path.suffix in UNPACKERS else path.suffix


def local(path: str | Path) -> File:
    """A file by its path."""
    return File(str(path), Path(path).expanduser())
