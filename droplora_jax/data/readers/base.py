"""What every reader shares: records with where each one stands, and lines of text."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass
from io import BufferedIOBase

from droplora_jax.core.errors import InputError
from droplora_jax.data.record import Fields

Record = tuple[str, Fields]  # where it stands, for errors; and the object
LONGEST = 64 * 2**20  # bytes of one line or row: a mistake in the file, not a text to learn
BATCH = 1024  # rows of a table that are turned into objects at once


@dataclass(frozen=True)
class Reader:
    """How files of one kind are read.

    Attributes:
      records: the objects in a stream of (unpacked) bytes, read as they are asked for; takes the
        file's name, for errors.
      seeks: the stream has to be seekable.
    """

    records: Callable[[BufferedIOBase, str], Iterator[Record]]
    seeks: bool = False


def lines(stream: BufferedIOBase, name: str) -> Iterator[tuple[int, str]]:
    """The lines of a UTF-8 text with their numbers, each with its end; a BOM is left out.

    Raises:
      InputError: names the line that is not UTF-8, or is too long.
    """
    number = 0
    while line := stream.readline(LONGEST + 1):
        number += 1
        if len(line) > LONGEST:
            raise too_long(f"{name}:{number}", "line")
        if number == 1:
            line = line.removeprefix(b"\xef\xbb\xbf")
        yield number, decoded(line, name, number)


def decoded(text: bytes, name: str, line: int) -> str:
    """UTF-8 that begins in a line of a file."""
    try:
        return text.decode()
    except UnicodeDecodeError as error:
        raise not_utf8(error, name, line) from error


def not_utf8(error: UnicodeDecodeError, name: str, line: int) -> InputError:
    """`line` is where the text begins that was decoded."""
    line += error.object.count(b"\n", 0, error.start)
    byte = error.object[error.start]
    return InputError(f"{name}:{line}: not UTF-8 (byte 0x{byte:02x}); save it as UTF-8")


def too_long(where: str, what: str) -> InputError:
    return InputError(
        f"{where}: the {what} is longer than {LONGEST // 2**20} MiB, the most that is read as one; "
        "is the file what its name says?"
    )


def as_object(where: str, row: object) -> Fields:
    if not isinstance(row, dict):
        raise InputError(f"{where}: must be an object with keys, is {kind(row)}")
    return row


def kind(value: object) -> str:
    """A JSON value, for a person."""
    kinds = {dict: "an object", list: "a list", str: "text", type(None): "null"}
    return kinds.get(type(value), repr(value))
