"""What every format turns its records into, and the checks they share."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field

from droplora_jax.core.errors import InputError
from droplora_jax.data.record import Call, Fields

USER, ASSISTANT, TOOL = "user", "assistant", "tool"


class Empty(InputError):
    """A text that has to hold something is empty; `key` says which."""

    def __init__(self, key: str) -> None:
        super().__init__(f"{key} is empty: fill it in or remove the row")
        self.key = key


@dataclass(frozen=True)
class Turn:
    """What one role says. What the assistant says is learnt.

    Attributes:
      role: one of `conversation.ROLES`.
      content: the words; None where there are none, but calls.
      calls: the assistant's calls of tools, as {"type": "function", "function": {"name",
        "arguments": an object}}.
      keys: what else a chat template may read of a message (`name`, `tool_call_id`, ...).
      learnt: of an assistant's turn, whether it is trained on.
    """

    role: str
    content: str | None
    calls: tuple[Call, ...] = ()
    keys: Fields = field(default_factory=dict)
    learnt: bool = True


@dataclass(frozen=True)
class Example:
    """One record, whatever its format: a conversation, or plain text.

    Attributes:
      turns: the conversation; empty for plain text.
      input: what a single instruction applies to, where that is kept apart from it.
      text: plain text; empty for a conversation.
      tools: that the assistant may call, as {"type": "function", "function": {"name", ...}}.
      first: the number of the first turn among the record's messages, for errors.
    """

    turns: tuple[Turn, ...] = ()
    input: str = ""
    text: str = ""
    tools: tuple[Call, ...] = ()
    first: int = 1


@dataclass(frozen=True)
class Format:
    """How records of one format look.

    Attributes:
      required: the keys by which a record is recognised.
      template: the name of the template it usually goes with.
      convert: record to `Example`; raises InputError that says what is wrong with which key.
      optional: further keys that are read. Any others are ignored.
      telling: what else a record of this format must show; by default its keys are enough.
    """

    required: tuple[str, ...]
    template: str
    convert: Callable[[Fields], Example]
    optional: tuple[str, ...] = ()
    telling: Callable[[Fields], bool] = lambda record: True

    def matches(self, record: Fields) -> bool:
        return all(key in record for key in self.required) and self.telling(record)

    @property
    def read(self) -> tuple[str, ...]:
        """All keys that are read."""
        return self.required + self.optional

    @property
    def keys(self) -> str:
        """The keys, for a person."""
        optional = "".join(f", optional {key}" for key in self.optional)
        return ", ".join(self.required) + optional


def exchange(prompt: str, response: str, input: str = "") -> Example:
    """An example of one prompt and one response."""
    return Example((Turn(USER, prompt), Turn(ASSISTANT, response)), input)


def text_of(record: Fields, key: str, *, may_be_empty: bool = False) -> str:
    """The text under a key.

    Raises:
      Empty: there is none in it.
      InputError: it is missing or is not text.
    """
    if key not in record:
        raise InputError(f"{key} is missing")
    value = record[key]
    if value is None and not may_be_empty:
        raise Empty(key)
    if not isinstance(value, str):
        raise InputError(f"{key} must be text, is {value!r:.60}")
    if not may_be_empty and not value.strip():
        raise Empty(key)
    check_unicode(key, value)
    return value


def check_unicode(key: str, text: str) -> None:
    try:
        text.encode()
    except UnicodeEncodeError as error:
        half = text[error.start]
        raise InputError(f"{key} holds half of a surrogate pair ({half!a})") from error
