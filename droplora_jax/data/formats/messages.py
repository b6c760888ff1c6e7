"""A conversation in OpenAI's form: `messages` of `role` and `content`, with tools and calls."""

from __future__ import annotations

import json

from droplora_jax.core.errors import InputError
from droplora_jax.data.formats.base import (
    ASSISTANT,
    TOOL,
    Example,
    Format,
    Turn,
    check_unicode,
    text_of,
)
from droplora_jax.data.formats.conversation import (
    CALLS,
    LEARNT,
    ROLES,
    conversation,
    is_learnt,
    messages_of,
    role_of,
)
from droplora_jax.data.formats.tools import calls_of
from droplora_jax.data.record import Fields

_ROLES = {**{role: role for role in ROLES}, "tool_call": ASSISTANT, "tool_response": TOOL}
_READ = ("role", "content", "tool_calls", *LEARNT)


def convert(record: Fields) -> Example:
    return conversation(record, messages_of(record, "messages"), message_turn)


def message_turn(message: Fields) -> Turn:
    """The turn of a message."""
    if "role" not in message and "from" in message:
        raise InputError(
            "role is missing, and there is a from: set data.columns={conversations: messages}"
        )
    name, role = role_of(message, "role", _ROLES)
    if name in CALLS:
        calls = calls_of("content", text_of(message, "content"))
        return Turn(ASSISTANT, None, calls, learnt=is_learnt(message, ASSISTANT))
    if message.get("function_call") is not None:
        raise InputError("function_call is no longer OpenAI's form: write it as tool_calls")
    calls = calls_of("tool_calls", message.get("tool_calls"))
    if calls and role != ASSISTANT:
        raise InputError(f"tool_calls of the {role}: only the {ASSISTANT} calls tools")
    learnt = is_learnt(message, role)
    others = {k: v for k, v in message.items() if k not in _READ and v is not None}
    check_unicode("one of its keys", json.dumps(others, ensure_ascii=False))
    return Turn(role, _content(message, role, bool(calls)), calls, others, learnt=learnt)


def _content(message: Fields, role: str, calls: bool) -> str | None:
    """The text, joined where it comes in parts."""
    content = message.get("content")
    if content is None and calls:
        return None
    if isinstance(content, list):
        content = "".join(_part(part, number) for number, part in enumerate(content, 1))
        message = {"content": content}
    return text_of(message, "content", may_be_empty=role != ASSISTANT or calls)


def _part(part: object, number: int) -> str:
    if isinstance(part, dict) and isinstance(part.get("text"), str):
        return part["text"]
    kind = part.get("type") if isinstance(part, dict) else part
    raise InputError(f"content: part {number} must be text, is {kind!r:.60}")


MESSAGES = Format(("messages",), "chat", convert, optional=("system", "tools"))
