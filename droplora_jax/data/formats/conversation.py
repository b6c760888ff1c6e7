"""What the formats of conversations share: roles, their order, tools and calls."""

from __future__ import annotations

import json
from collections.abc import Callable, Sequence
from dataclasses import replace
from typing import cast

from droplora_jax.core.errors import InputError
from droplora_jax.data.formats.base import (
    ASSISTANT,
    TOOL,
    USER,
    Empty,
    Example,
    Turn,
    check_served,
    check_unicode,
    json_of,
    pass_over,
    system_of,
)
from droplora_jax.data.record import Call, Fields, WrittenFields

SYSTEM = ("system", "developer")
ROLES = (*SYSTEM, USER, ASSISTANT, TOOL)
# Keys by which data sets say whether a message is learnt: 0 or 1, or true or false.
LEARNT = ("weight", "train", "training", "loss")


def messages_of(record: Fields, key: str) -> list[object]:
    """The messages under a key; a list, or the JSON of one.

    Raises:
      InputError: there is no list, or an empty one.
    """
    messages = json_of(record.get(key))
    if not isinstance(messages, list) or not messages:
        raise InputError(f"{key} must be a list of objects")
    return messages


def conversation(
    record: Fields,
    messages: Sequence[object],
    turn: Callable[[Fields], Turn],
    *,
    given: int = 0,
) -> Example:
    """The example of a record that holds a list of messages.

    Args:
      record: may have `system` and `tools`.
      messages: its messages.
      turn: from a message to its turn; the message's number is added to what it raises.
      given: the number of the first messages of which nothing is learnt.

    Raises:
      InputError: a message is not as it should be; names its number.
    """
    turns = tuple(_numbered(turn, message, n) for n, message in enumerate(messages, 1))
    check_order(turns)
    turns = (*(replace(turn, learnt=False) for turn in turns[:given]), *turns[given:])
    if not any(turn.role == ASSISTANT and turn.learnt for turn in turns):
        raise InputError(f"there is no message of the {ASSISTANT} that is learnt")
    before = _system_before(record, turns)
    tools = tools_of(record.get("tools"))
    return Example((*before, *turns), tools=tools, first=1 - len(before))


def _system_before(record: Fields, turns: Sequence[Turn]) -> tuple[Turn, ...]:
    """The turn of the key `system`, if the messages do not begin with that turn."""
    if turns[0].role not in SYSTEM:
        return system_of(record)
    if record.get("system") not in (None, "", turns[0].content):
        raise InputError("message 1: a second system message, beside that of the key system")
    return ()


def is_learnt(message: Fields, role: str) -> bool:
    """Whether a message is learnt, by the keys that say so.

    Raises:
      InputError: a key says neither yes nor no, or asks for something that is not served.
    """
    marks = {key: message[key] for key in LEARNT if message.get(key) is not None}
    for key, value in marks.items():
        if value not in (0, 1):
            raise InputError(f"{key}={value!r:.60}: must be 0 or 1; {pass_over(key)}")
        if value and role != ASSISTANT and key in ("train", "training"):
            raise InputError(
                f"{key}={value!r} of the {role}: only messages of the {ASSISTANT} are learnt; "
                + pass_over(key)
            )
    return all(marks.values())


def _numbered(turn: Callable[[Fields], Turn], message: object, number: int) -> Turn:
    where = f"message {number}"
    message = json_of(message)
    if not isinstance(message, dict):
        raise InputError(f"{where} must be an object, is {message!r:.60}")
    try:
        check_served(message, ())
        return turn(message)
    except Empty as error:
        raise Empty(f"{where}: {error.key}") from error
    except InputError as error:
        raise InputError(f"{where}: {error}") from error


def check_order(turns: Sequence[Turn]) -> None:
    """Raise InputError for an order of messages that no chat template can mean.

    Results of tools follow calls, or words of the assistant, which may hold the calls as text.
    Other orders (two turns of the user in a row, a system turn in the middle) are valid for some
    chat templates; the others raise an error of their own.
    """
    if turns[0].role == ASSISTANT:
        raise InputError(
            f"message 1: the first message is the {ASSISTANT}'s, with nothing to answer; take it "
            f"out, or put one of the {USER} before it"
        )
    pending: list[Call] = []
    called_in_words = False
    for number, turn in enumerate(turns, 1):
        if turn.role != TOOL:
            pending = list(turn.calls)
            called_in_words = turn.role == ASSISTANT and not turn.calls
            continue
        if called_in_words and "tool_call_id" not in turn.keys:
            continue
        if not pending:
            raise InputError(f"message {number}: the result of a tool without a call before it")
        pending.pop(_answered(turn, pending, number))


def _answered(turn: Turn, pending: Sequence[Call], number: int) -> int:
    """The index of the call that a result answers: the one of its id, or the first."""
    ids = [call.get("id") for call in pending]
    id = turn.keys.get("tool_call_id")
    if id is None or None in ids:
        return 0
    if id not in ids:
        raise InputError(
            f"message {number}: tool_call_id={id!r}: the calls before it that are not answered "
            f"have the ids {', '.join(map(repr, ids))}"
        )
    return ids.index(id)


def tools_of(value: object) -> tuple[Call, ...]:
    """Tools in the form of chat templates, from a list or its JSON.

    A bare {"name", ...} is wrapped as {"type": "function", "function": ...}.
    """
    return tuple(
        _function("tools", tool, number) for number, tool in enumerate(_listed("tools", value), 1)
    )


def calls_of(key: str, value: object) -> tuple[Call, ...]:
    """Calls in the form of chat templates, from an object, a list of objects, or JSON of either.

    Arguments that are given as JSON become objects that remember it, and no arguments an empty one.
    """
    listed = enumerate(_listed(key, value), 1)
    return tuple(_call(key, _function(key, call, number)) for number, call in listed)


def _listed(key: str, value: object) -> list[object]:
    if value is None or value == "":
        return []
    if isinstance(value, str):
        value = _parsed(key, value)
    check_unicode(key, json.dumps(value, ensure_ascii=False))
    return value if isinstance(value, list) else [value]


def _function(key: str, value: object, number: int) -> Call:
    if isinstance(value, dict) and "function" not in value and "name" in value:
        value = {"type": "function", "function": value}
    function = value.get("function") if isinstance(value, dict) else None
    if not isinstance(function, dict) or not isinstance(function.get("name"), str):
        raise InputError(
            f"{key}: number {number} must be an object with a function that has a name, is "
            f"{value!r:.60}"
        )
    return cast(Call, value)


def _call(key: str, call: Call) -> Call:
    function = call["function"]
    written: object = function.get("arguments")
    arguments = {} if written is None or written == "" else written
    if isinstance(arguments, str):
        parsed = _parsed(f"{key}: the arguments of {function['name']}", arguments)
        arguments = WrittenFields(parsed, arguments) if isinstance(parsed, dict) else parsed
    if not isinstance(arguments, dict):
        raise InputError(
            f"{key}: the arguments of {function['name']} must be an object, are {arguments!r:.60}"
        )
    return {**call, "function": {**function, "arguments": arguments}}


def _parsed(key: str, text: str) -> object:
    try:
        return json.loads(text)
    except (ValueError, RecursionError) as error:
        raise InputError(f"{key} must be JSON ({error}), is {text!r:.60}") from error
