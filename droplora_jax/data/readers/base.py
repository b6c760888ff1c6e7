"""What readers share: records with their places, and lines of text."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass
from io import BufferedIOBase

from droplora_jax.core.errors import InputError
from droplora_jax.data.record import Fields

Record = tuple[str, Fields]  # its place in the file, for errors, and the object
LONGEST = 64 * 2**20  # bytes of one line or row; a longer one is a mistake in the file
BATCH = 1024  # rows of a table that are turned into objects at once


@dataclass(frozen=True)
class Reader:
    """The contract of a kind of file.

    A reader turns a stream of unpacked bytes into records, one at a time, so that a file of any
    size is read in little memory. Each record comes with its place ("a.jsonl:17"), which all later
    errors about it name. What a reader can't read it reports as an InputError that names the file,
    the line or row, and the rule; it never skips a record. Empty files are reported by the caller.

    Attributes:
      records: the records of a stream; the second argument is the file's name, for errors.
      seeks: whether the stream must be seekable.
    """

    records: Callable[[BufferedIOBase, str], Iterator[Record]]
    seeks: bool = False


def lines(stream: BufferedIOBase, name: str) -> Iterator[tuple[int, str]]:
    """The lines of a UTF-8 text with their numbers and line ends, without a byte order mark.

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
    """A JSON value in words, for errors."""
    kinds = {dict: "an object", list: "a list", str: "text", type(None): "null"}
    return kinds.get(type(value), repr(value))
