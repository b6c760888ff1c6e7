"""What the formats of conversations share: roles, their order, and what is learnt."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import replace

from droplora_jax.core.errors import InputError
from droplora_jax.data.formats.base import (
    ASSISTANT,
    TOOL,
    USER,
    Empty,
    Example,
    Turn,
    check_served,
    json_of,
    pass_over,
    system_of,
    text_of,
)
from droplora_jax.data.formats.tools import declared_calls, tools_of
from droplora_jax.data.record import Call, Fields

SYSTEM = ("system", "developer")
ROLES = (*SYSTEM, USER, ASSISTANT, TOOL)
# Roles of messages whose text is a call of a tool, or several.
CALLS = ("function_call", "tool_call")
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
    turns = tuple(replace(turn, calls=declared_calls(turn.calls, tools)) for turn in turns)
    return Example((*before, *turns), tools=tools, first=1 - len(before))


def _system_before(record: Fields, turns: Sequence[Turn]) -> tuple[Turn, ...]:
    """The turn of the key `system`, if the messages do not begin with that turn."""
    if turns[0].role not in SYSTEM:
        return system_of(record)
    if record.get("system") not in (None, "", turns[0].content):
        raise InputError("message 1: a second system message, beside that of the key system")
    return ()


def role_of(message: Fields, key: str, roles: Mapping[str, str]) -> tuple[str, str]:
    """The role of a message as it stands there, and as one of `ROLES`.

    Args:
      message: of any format.
      key: where the role stands; neither its case nor space around it matters.
      roles: the roles of the format, and those of `ROLES` that they are.
    """
    value = text_of(message, key)
    name = value.strip().lower()
    if name not in roles:
        raise InputError(f"{key}={value!r}: must be one of {', '.join(roles)}")
    return name, roles[name]


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
            raise InputError(
                f"message {number}: the result of a tool without a call before it; calls that are "
                "made at once stand in one message, as a list"
            )
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
