"""What every format turns its records into, and the checks they share."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

from droplora_jax.errors import InputError

USER, ASSISTANT = "user", "assistant"


@dataclass(frozen=True)
class Turn:
    """What one role says. What the assistant says is learnt."""

    role: str
    content: str


@dataclass(frozen=True)
class Example:
    """One record, whatever its format: a conversation, or plain text.

    Attributes:
      turns: the conversation; empty for plain text.
      input: what a single instruction applies to, where that is kept apart from it.
      text: plain text; empty for a conversation.
    """

    turns: tuple[Turn, ...] = ()
    input: str = ""
    text: str = ""


@dataclass(frozen=True)
class Format:
    """How records of one format look.

    Attributes:
      required: the keys by which a record is recognised.
      template: the name of the template it usually goes with.
      convert: record to `Example`; raises InputError that says what is wrong with which key.
      optional: further keys that are read. Any others are ignored.
    """

    required: tuple[str, ...]
    template: str
    convert: Callable[[Mapping[str, Any]], Example]
    optional: tuple[str, ...] = ()

    def matches(self, record: Mapping[str, Any]) -> bool:
        return all(key in record for key in self.required)

    @property
    def keys(self) -> str:
        """The keys, for a person."""
        optional = "".join(f", optional {key}" for key in self.optional)
        return ", ".join(self.required) + optional


def exchange(prompt: str, response: str, input: str = "") -> Example:
    """An example of one prompt and one response."""
    return Example((Turn(USER, prompt), Turn(ASSISTANT, response)), input)


def text_of(record: Mapping[str, Any], key: str, *, may_be_empty: bool = False) -> str:
    """The text under a key.

    Raises:
      InputError: it is missing, is not text, or is empty.
    """
    if key not in record:
        raise InputError(f"{key} is missing")
    value = record[key]
    if not isinstance(value, str):
        raise InputError(f"{key} must be text, is {value!r:.60}")
    if not may_be_empty and not value.strip():
        raise InputError(f"{key} is empty: fill it in or remove the row")
    try:
        value.encode()
    except UnicodeEncodeError as error:
        half = value[error.start]
        raise InputError(f"{key} holds half of a surrogate pair ({half!a})") from error
    return value
