"""ShareGPT: `conversations` of `from` and `value`, with calls of tools and their results."""

from __future__ import annotations

from droplora_jax.core.errors import InputError
from droplora_jax.data.formats.base import (
    ASSISTANT,
    TOOL,
    USER,
    Example,
    Format,
    Turn,
    pass_over,
    text_of,
)
from droplora_jax.data.formats.conversation import calls_of, conversation, is_learnt, messages_of
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
    example = conversation(record, messages_of(record, "conversations"), _turn)
    if example.turns[-1].role != ASSISTANT and record.get("chosen"):
        raise InputError(
            "chosen: the last answer is one of a pair of answers, and pairs are not trained; "
            + pass_over("chosen")
        )
    return example


def _turn(message: Fields) -> Turn:
    if "from" not in message and "role" in message:
        raise InputError(
            "from is missing, and there is a role: set data.columns={messages: conversations}"
        )
    role = text_of(message, "from")
    if role not in ROLES:
        raise InputError(f"from={role!r}: must be one of {', '.join(ROLES)}")
    value = text_of(message, "value", may_be_empty=ROLES[role] != ASSISTANT)
    if role == CALL:
        calls = calls_of("value", value)
        return Turn(ASSISTANT, None, calls, learnt=is_learnt(message, ASSISTANT))
    return Turn(ROLES[role], value, learnt=is_learnt(message, ROLES[role]))


SHAREGPT = Format(("conversations",), "chat", convert, optional=("system", "tools"))
