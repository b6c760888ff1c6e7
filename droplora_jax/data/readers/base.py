"""What readers share: records with their places, and lines of text."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass
from io import BufferedIOBase
from typing import Protocol, cast

from droplora_jax.core.errors import InputError
from droplora_jax.data.record import Fields

Record = tuple[str, Fields]  # its place in the file, for errors, and the object
Read = tuple[str, Fields | InputError]  # the same, or what is wrong with that record alone
LONGEST = 64 * 2**20  # bytes of one line or row; a longer one is a mistake in the file
BATCH = 1024  # rows of a table that are turned into objects at once
MARK = b"\xef\xbb\xbf"  # of the byte order, with which some programs begin UTF-8


@dataclass(frozen=True)
class Reader:
    """The contract of a kind of file.

    A reader turns a stream of unpacked bytes into records, one at a time, so that a file of any
    size is read in little memory. Each record comes with its place ("a.jsonl:17"), which all later
    errors about it name. What a reader can't read it reports as an InputError that names the file,
    the line or row, and the rule; it never skips a record. It gives the error in the record's place
    if it can go on with the next record, and else raises it. Empty files are reported by the
    caller.

    Attributes:
      records: the records of a stream; the second argument is the file's name, for errors.
      seeks: whether the stream must be seekable.
      text: whether the stream is text, and must be UTF-8.
    """

    records: Callable[[BufferedIOBase, str], Iterator[Read]]
    seeks: bool = False
    text: bool = False


class _Peekable(Protocol):
    """What all streams of data files are: they show their next bytes without reading them."""

    def peek(self, size: int, /) -> bytes: ...


def next_bytes(stream: BufferedIOBase) -> bytes:
    """The next bytes of a stream, which remain to be read; at least one unless it is at its end."""
    return cast(_Peekable, stream).peek(2**10)


def lines(stream: BufferedIOBase, name: str) -> Iterator[tuple[int, bytes]]:
    """The lines of a text with their numbers and line ends, without marks of the byte order.

    Such a mark may stand before any line: files that begin with one are joined to larger ones.

    Raises:
      InputError: a line is too long.
    """
    number = 0
    while line := stream.readline(LONGEST + 1):
        number += 1
        if len(line) > LONGEST:
            raise too_long(f"{name}:{number}", "line")
        yield number, line.removeprefix(MARK)


def decoded(text: bytes, name: str, line: int) -> str:
    """Decoded UTF-8; `line` is the line of the file in which it begins."""
    try:
        return text.decode()
    except UnicodeDecodeError as error:
        raise not_utf8(error, name, line) from error


def not_utf8(error: UnicodeDecodeError, name: str, line: int) -> InputError:
    """`line` is the line of the file in which the decoded text begins."""
    line += error.object.count(b"\n", 0, error.start)
    byte = error.object[error.start]
    return InputError(f"{name}:{line}: not UTF-8 (byte 0x{byte:02x}); save it as UTF-8")


class TooLong(InputError):
    """A line or row is longer than `LONGEST`."""


def too_long(where: str, what: str) -> TooLong:
    return TooLong(
        f"{where}: the {what} is longer than {LONGEST // 2**20} MiB, the most that is read as one; "
        "is the file what its name says?"
    )


def as_object(where: str, row: object) -> Fields | InputError:
    """The row, or an error if it is no object."""
    if not isinstance(row, dict):
        return InputError(f"{where}: must be an object with keys, is {kind(row)}")
    return row


def kind(value: object) -> str:
    """A JSON value in words, for errors."""
    kinds = {dict: "an object", list: "a list", str: "text", type(None): "null"}
    return kinds.get(type(value), repr(value))
