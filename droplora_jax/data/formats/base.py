"""The contract of a format, the example that it makes, and the checks that formats share."""

from __future__ import annotations

import json
from collections.abc import Callable, Collection
from dataclasses import dataclass, field

from droplora_jax.core.errors import InputError
from droplora_jax.data.record import Call, Fields

USER, ASSISTANT, TOOL = "user", "assistant", "tool"


class Empty(InputError):
    """A text that must not be empty is; `key` names it."""

    def __init__(self, key: str) -> None:
        super().__init__(f"{key} is empty: fill it in or remove the row")
        self.key = key


@dataclass(frozen=True)
class Turn:
    """One message of a conversation. The assistant's are trained on.

    Attributes:
      role: one of `conversation.ROLES`.
      content: the text; None for a message of calls alone.
      calls: the assistant's calls of tools, as {"type": "function", "function": {"name",
        "arguments": an object}}.
      keys: further keys that a chat template may read (`name`, `tool_call_id`, ...).
      learnt: whether the turn is trained on, if it is the assistant's.
    """

    role: str
    content: str | None
    calls: tuple[Call, ...] = ()
    keys: Fields = field(default_factory=dict)
    learnt: bool = True


@dataclass(frozen=True)
class Example:
    """One record in the form that all formats share: a conversation, or plain text.

    Attributes:
      turns: the conversation; empty for plain text.
      input: the text that a single instruction applies to, where a format has it apart.
      text: plain text; empty for a conversation.
      tools: what the assistant may call, as {"type": "function", "function": {"name", ...}}.
      first: the number of the first turn among the record's messages, for errors.
    """

    turns: tuple[Turn, ...] = ()
    input: str = ""
    text: str = ""
    tools: tuple[Call, ...] = ()
    first: int = 1


@dataclass(frozen=True)
class Format:
    """The contract of a format: how its records look and become examples.

    A format is recognised by its keys. `convert` is a pure function from a record to an `Example`;
    it checks everything that it reads and raises an InputError that names the key and the rule,
    without the file and line, which the caller adds. For a text that must not be empty and is, it
    raises `Empty`, so that the run's `data.empty` can decide. Columns are renamed before; a format
    knows its own keys alone. It does not write out prompts: that is the template's part.

    Attributes:
      required: the keys by which a record is recognised.
      template: the name of the template that `data.template=auto` takes.
      convert: from a record to its `Example`.
      optional: further keys that are read; all others are ignored, but for `NOT_SERVED`.
      telling: what a record must fulfil beside having the keys; by default nothing.
    """

    required: tuple[str, ...]
    template: str
    convert: Callable[[Fields], Example]
    optional: tuple[str, ...] = ()
    telling: Callable[[Fields], bool] = lambda record: True

    def example(self, record: Fields, mapped: Collection[str] = ()) -> Example:
        """The example of a record.

        Args:
          record: has the keys of the format.
          mapped: keys of the record that are read under others.

        Raises:
          Empty, InputError: see `convert`; or the record has a key that means something which is
            not served.
        """
        check_served(record, (*self.read, *mapped))
        return self.convert(record)

    def matches(self, record: Fields) -> bool:
        return all(key in record for key in self.required) and self.telling(record)

    @property
    def read(self) -> tuple[str, ...]:
        """All keys that the format reads."""
        return self.required + self.optional

    @property
    def keys(self) -> str:
        """The keys in words, for errors."""
        optional = "".join(f", optional {key}" for key in self.optional)
        return ", ".join(self.required) + optional


_TEXT_ALONE = "only text is trained here"
# Keys by which other trainers change what a row means, and what is to be said of them. A key that
# the format reads is served.
NOT_SERVED = {
    "image": _TEXT_ALONE,
    "images": _TEXT_ALONE,
    "video": _TEXT_ALONE,
    "videos": _TEXT_ALONE,
    "audio": _TEXT_ALONE,
    "audios": _TEXT_ALONE,
    "chat_template_kwargs": "every row is written by the chat template as it is",
    "functions": "tools are read under the key tools: set data.columns={tools: functions}",
    "tool_defs": "tools are read under the key tools: set data.columns={tools: tool_defs}",
    "kto_tag": "the row's answer is marked as not wanted, and would be trained",
    **dict.fromkeys(
        ("train_detail", "training_detail", "loss_scale"),
        "a message is learnt as a whole or not at all (weight of 1 or 0)",
    ),
}
_SERVED_VALUES = {"kto_tag": True, "loss_scale": 1}


def check_served(record: Fields, read: Collection[str]) -> None:
    """Raise InputError for keys with a meaning that is not served.

    Args:
      record: a row, or a message of one.
      read: the keys that are.
    """
    problems = []
    for key, why in NOT_SERVED.items():
        if key not in record or key in read:
            continue
        value = record[key]
        if value not in (None, "", [], {}) and value != _SERVED_VALUES.get(key):
            problems.append(f"{key}={value!r:.40}: {why}; {pass_over(key)}")
    if problems:
        raise InputError("; ".join(problems))


def check_context(record: Fields, columns: str) -> None:
    """Raise InputError for a text under `context`, without which the question has no answer.

    Args:
      record: a row whose format reads no key of this name.
      columns: the mapping with which it is read.
    """
    if context := record.get("context"):
        raise InputError(
            f"context={context!r:.40}: would be left out; set data.columns={{{columns}}}; "
            + pass_over("context")
        )


def pass_over(key: str) -> str:
    """How to go on in spite of a key, for errors."""
    return f"data.ignore_keys=[{key}] passes it over"


def exchange(prompt: str, response: str, input: str = "") -> Example:
    """An example of one prompt and one response."""
    return Example((Turn(USER, prompt), Turn(ASSISTANT, response)), input)


def system_of(record: Fields) -> tuple[Turn, ...]:
    """The turn of the key `system`, if there is one.

    Raises:
      InputError: the record has another key for it.
    """
    if record.get("system") is not None:
        text = text_of(record, "system", may_be_empty=True)
        if text.strip():
            return (Turn("system", text),)
    if record.get("system_prompt"):
        raise InputError(
            f"system_prompt={record['system_prompt']!r:.40}: a system message is read under the "
            "key system: set data.columns={system: system_prompt}; "
            f"{pass_over('system_prompt')}"
        )
    return ()


def json_of(value: object) -> object:
    """The value, parsed where it is the JSON of a list or an object, as in the cells of a table."""
    if not isinstance(value, str) or value.lstrip()[:1] not in ("[", "{"):
        return value
    try:
        return json.loads(value)
    except (ValueError, RecursionError):
        return value


def text_of(record: Fields, key: str, *, may_be_empty: bool = False) -> str:
    """The text under a key.

    Raises:
      Empty: the text is null or white space, and may not be.
      InputError: the key is missing or its value is not text.
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
    """Raise InputError for half of a surrogate pair, which no tokenizer can encode."""
    try:
        text.encode()
    except UnicodeEncodeError as error:
        half = text[error.start]
        raise InputError(f"{key} holds half of a surrogate pair ({half!a})") from error
