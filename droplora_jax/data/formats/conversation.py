"""What the formats of conversations share: roles, their order, tools and calls."""

from __future__ import annotations

import json
from collections.abc import Callable, Sequence
from typing import cast

from droplora_jax.core.errors import InputError
from droplora_jax.data.formats.base import (
    ASSISTANT,
    TOOL,
    USER,
    Empty,
    Example,
    Turn,
    check_unicode,
)
from droplora_jax.data.record import Call, Fields

ROLES = ("system", "developer", USER, ASSISTANT, TOOL)


def conversation(
    record: Fields,
    key: str,
    turn: Callable[[Fields], Turn],
    before: Sequence[Turn] = (),
) -> Example:
    """The example of a record that holds a list of messages.

    Args:
      record: has the messages under `key`, and perhaps `tools`.
      key: the key of the messages.
      turn: from a message to its turn; the message's number is added to what it raises.
      before: turns that precede the messages.

    Raises:
      InputError: a message is not as it should be; names its number.
    """
    messages = record.get(key)
    if not isinstance(messages, list) or not messages:
        raise InputError(f"{key} must be a list of objects")
    turns = tuple(_numbered(turn, message, n) for n, message in enumerate(messages, 1))
    check_order(turns)
    if not any(turn.role == ASSISTANT and turn.learnt for turn in turns):
        raise InputError(f"{key} has no message of the {ASSISTANT} that is learnt")
    tools = tools_of(record.get("tools"))
    return Example((*before, *turns), tools=tools, first=1 - len(before))


def _numbered(turn: Callable[[Fields], Turn], message: object, number: int) -> Turn:
    where = f"message {number}"
    if not isinstance(message, dict):
        raise InputError(f"{where} must be an object, is {message!r:.60}")
    try:
        return turn(message)
    except Empty as error:
        raise Empty(f"{where}: {error.key}") from error
    except InputError as error:
        raise InputError(f"{where}: {error}") from error


def check_order(turns: Sequence[Turn]) -> None:
    """Raise InputError for an order of messages that no chat template can mean.

    Other orders (two turns of the user in a row, a system turn in the middle) are valid for some
    chat templates; the others raise an error of their own.
    """
    if turns[0].role == ASSISTANT:
        raise InputError(
            f"message 1: the first message is the {ASSISTANT}'s, with nothing to answer; take it "
            f"out, or put one of the {USER} before it"
        )
    pending: list[Call] = []
    for number, turn in enumerate(turns, 1):
        if turn.role != TOOL:
            pending = list(turn.calls)
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

    Arguments that are given as JSON become objects.
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
    arguments: object = function.get("arguments")
    if isinstance(arguments, str):
        arguments = _parsed(f"{key}: the arguments of {function['name']}", arguments or "{}")
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
