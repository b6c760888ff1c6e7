"""ShareGPT: `conversations` of `from` and `value`, with calls of tools and their results."""

from __future__ import annotations

from droplora_jax.core.errors import InputError
from droplora_jax.data.formats.base import ASSISTANT, TOOL, USER, Example, Format, Turn, text_of
from droplora_jax.data.formats.conversation import calls_of, conversation
from droplora_jax.data.record import Fields

CALL = "function_call"
ROLES = {
    "system": "system",
    "human": USER,
    "user": USER,
    "gpt": ASSISTANT,
    "assistant": ASSISTANT,
    CALL: ASSISTANT,
    "observation": TOOL,
    "tool": TOOL,
}


def convert(record: Fields) -> Example:
    has_system = record.get("system") is not None
    system = text_of(record, "system", may_be_empty=True) if has_system else ""
    before = [Turn("system", system)] if system else []
    example = conversation(record, "conversations", _turn, before)
    if before and example.turns[1].role == "system":
        raise InputError("message 1: a second system message, beside that of the key system")
    return example


def _turn(message: Fields) -> Turn:
    if "from" not in message and "role" in message:
        raise InputError(
            "from is missing, and there is a role: set data.columns={messages: conversations}"
        )
    role = text_of(message, "from")
    if role not in ROLES:
        raise InputError(f"from={role!r}: must be one of {', '.join(ROLES)}")
    learnt = ROLES[role] == ASSISTANT
    value = text_of(message, "value", may_be_empty=not learnt)
    if role == CALL:
        return Turn(ASSISTANT, None, calls_of("value", value))
    return Turn(ROLES[role], value)


SHAREGPT = Format(("conversations",), "chat", convert, optional=("system", "tools"))
