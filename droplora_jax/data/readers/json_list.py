"""JSON: a list of objects, of which no more than one is in memory at a time; or what is found
under the same ending: objects one after the other, or one object that holds all rows.

The standard library's decoder reads each object, so that values are those of `json.loads`: NaN,
integers of any size and half a surrogate pair too (which streaming parsers on yajl refuse, or
replace by a question mark without a word), and an error can name the row and the line.
"""

from __future__ import annotations

import codecs
import json
import re
from collections.abc import Iterator
from io import BufferedIOBase

from droplora_jax.core.errors import InputError
from droplora_jax.data.readers.base import (
    LONGEST,
    Read,
    Reader,
    TooLong,
    as_object,
    kind,
    not_utf8,
    too_long,
)
from droplora_jax.data.readers.json_object import rows_within

_PART = 2**20  # bytes read at once
_SPACE = re.compile(r"[ \t\r\n\ufeff]*")  # a mark of the byte order stands where files are joined
# An error this close to the end of the text may come from a constant that is cut off there, such as
# -Infinity or \ud83d\ude42.
_NEAR_THE_END = 12  # characters


def _records(stream: BufferedIOBase, name: str) -> Iterator[Read]:
    text = _Text(stream, name)
    match text.peek():
        case "":
            return
        case "[":
            yield from _listed(text)
        case _:
            yield from _objects(text)


def _listed(text: _Text) -> Iterator[Read]:
    """The objects of a list."""
    text.skip()
    number = 0
    while text.peek() != "]":
        if number:
            text.expect(",")
        number += 1
        where = f"{text.name}, row {number}"
        yield where, as_object(where, text.value(where))
    if not number:
        raise InputError(f"{text.name}: the list is empty")
    text.skip()
    if text.peek():
        raise text.broken("Extra data", text.at)


def _objects(text: _Text) -> Iterator[Read]:
    """Objects one after the other, or those within the only one."""
    line, value = text.line, _first_object(text)
    if not text.peek():
        if not isinstance(value, dict):
            raise InputError(f"{text.name}: must be a list of objects, is {kind(value)}")
        rows = rows_within(text.name, value)
        if rows is not None:
            places = (f"{text.name}, row {number}" for number in range(1, len(rows) + 1))
            yield from (
                (where, as_object(where, row)) for where, row in zip(places, rows, strict=True)
            )
            return
    where = f"{text.name}:{line}"
    yield where, as_object(where, value)
    while text.peek():
        where = f"{text.name}:{text.line}"
        yield where, as_object(where, text.value(where))


def _first_object(text: _Text) -> object:
    try:
        return text.value()
    except TooLong as error:
        raise InputError(
            f"{error} Rows within one object are read at once; a list of rows that is the whole "
            "file, or one row a line, may have any length"
        ) from error


JSON_LIST = Reader(_records, text=True)


class _Text:
    """The part of a text from `at` on that has been read; more is read when it is needed."""

    def __init__(self, stream: BufferedIOBase, name: str) -> None:
        self.name, self._stream = name, stream
        self._decode = codecs.getincrementaldecoder("utf-8-sig")().decode
        self._json = json.JSONDecoder().raw_decode
        self._text, self.at, self._ended = "", 0, False
        self._line, self._counted = 1, 0  # the line of the character `_counted`

    @property
    def line(self) -> int:
        """The line of the file in which the next character stands."""
        self._line += self._text.count("\n", self._counted, self.at)
        self._counted = self.at
        return self._line

    def peek(self) -> str:
        """The next character that is not white space; "" at the end."""
        while True:
            self.at = _match_end(_SPACE, self._text, self.at)
            if self.at < len(self._text):
                return self._text[self.at]
            if not self._more():
                return ""

    def skip(self) -> None:
        self.at += 1

    def expect(self, character: str) -> None:
        if self.peek() != character:
            raise self.broken(f"Expecting {character!r} delimiter", self.at)
        self.skip()

    def value(self, where: str = "") -> object:
        """The next JSON value."""
        self.peek()
        while True:
            try:
                value, end = self._json(self._text, self.at)
            except json.JSONDecodeError as error:
                cut = error.pos > len(self._text) - _NEAR_THE_END or "Unterminated" in error.msg
                if cut and self._more():
                    continue
                raise self.broken(error.msg, error.pos) from error
            except (ValueError, RecursionError) as error:
                raise InputError(f"{where or self.name}: broken JSON ({error})") from error
            # A number at the end of what has been read may continue.
            if end == len(self._text) and self._more():
                continue
            self.at = end
            return value

    def broken(self, reason: str, at: int) -> InputError:
        line = self.line + self._text.count("\n", self.at, at)
        return InputError(f"{self.name}:{line}: broken JSON ({reason})")

    def _more(self) -> bool:
        """Reads more; whether there was any. Doubles the part that is read while a row grows."""
        if self._ended:
            return False
        line = self.line
        self._text, self.at, self._counted = self._text[self.at :], 0, 0
        if len(self._text) > LONGEST:
            raise too_long(f"{self.name}:{line}", "row")
        left = LONGEST + 1 - len(self._text)
        raw = self._stream.read(min(max(_PART, len(self._text)), left))
        self._ended = not raw
        try:
            self._text += self._decode(raw, self._ended)
        except UnicodeDecodeError as error:
            raise not_utf8(error, self.name, line + self._text.count("\n")) from error
        return True


def _match_end(pattern: re.Pattern[str], text: str, at: int) -> int:
    match = pattern.match(text, at)
    return match.end() if match else at
