"""JSON: one list of objects, of which no more than one is in memory at a time.

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
    Reader,
    Record,
    as_object,
    kind,
    not_utf8,
    too_long,
)

_PART = 2**20  # bytes read at once
_SPACE = re.compile(r"[ \t\r\n]*")
# An error this close to the end of the text may come from a constant that is cut off there, such as
# -Infinity or \ud83d\ude42.
_NEAR_THE_END = 12  # characters


def _records(stream: BufferedIOBase, name: str) -> Iterator[Record]:
    text = _Text(stream, name)
    if not text.peek():
        return
    if text.peek() != "[":
        value = text.value()
        if text.peek():
            raise text.broken("Extra data", text.at)
        raise InputError(f"{name}: must be a list of objects, is {kind(value)}")
    text.skip()
    number = 0
    while text.peek() != "]":
        if number:
            text.expect(",")
        number += 1
        where = f"{name}, row {number}"
        yield where, as_object(where, text.value(where))
    if not number:
        raise InputError(f"{name}: the list is empty")
    text.skip()
    if text.peek():
        raise text.broken("Extra data", text.at)


JSON_LIST = Reader(_records)


class _Text:
    """The part of a text from `at` on that has been read; more is read when it is needed."""

    def __init__(self, stream: BufferedIOBase, name: str) -> None:
        self.name, self._stream = name, stream
        self._decode = codecs.getincrementaldecoder("utf-8-sig")().decode
        self._json = json.JSONDecoder().raw_decode
        self._text, self.at, self._line, self._ended = "", 0, 1, False

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
        line = self._line + self._text.count("\n", 0, at)
        hint = ""
        if reason == "Extra data":
            hint = "; a file of one object a line is named .jsonl"
        return InputError(f"{self.name}:{line}: broken JSON ({reason}){hint}")

    def _more(self) -> bool:
        """Reads more; whether there was any. Doubles the part that is read while a row grows."""
        if self._ended:
            return False
        self._line += self._text.count("\n", 0, self.at)
        self._text, self.at = self._text[self.at :], 0
        if len(self._text) > LONGEST:
            raise too_long(f"{self.name}:{self._line}", "row")
        left = LONGEST + 1 - len(self._text)
        raw = self._stream.read(min(max(_PART, len(self._text)), left))
        self._ended = not raw
        try:
            self._text += self._decode(raw, self._ended)
        except UnicodeDecodeError as error:
            line = self._line + self._text.count("\n")
            raise not_utf8(error, self.name, line) from error
        return True


def _match_end(pattern: re.Pattern[str], text: str, at: int) -> int:
    match = pattern.match(text, at)
    return match.end() if match else at
