"""A conversation: `messages`, a list of objects with `role` and `content`."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from droplora_jax.data.formats.base import ASSISTANT, Example, Format, Turn, text_of
from droplora_jax.errors import InputError


def convert(record: Mapping[str, Any]) -> Example:
    messages = record.get("messages")
    if not isinstance(messages, list) or not messages:
        raise InputError("messages must be a list of objects with role and content")
    turns = tuple(_turn(message, number) for number, message in enumerate(messages, 1))
    if not any(turn.role == ASSISTANT for turn in turns):
        raise InputError(f"messages has no message whose role is {ASSISTANT}: nothing to learn")
    return Example(turns)


def _turn(message: Any, number: int) -> Turn:
    if not isinstance(message, dict):
        raise InputError(f"message {number} must be an object with role and content")
    try:
        role = text_of(message, "role")
        return Turn(role, text_of(message, "content", may_be_empty=role != ASSISTANT))
    except InputError as error:
        raise InputError(f"message {number}: {error}") from error


MESSAGES = Format(("messages",), "chat", convert)
