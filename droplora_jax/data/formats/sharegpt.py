"""ShareGPT: `conversations` of `from` and `value`, with calls of tools and their results.

Messages in OpenAI's form are read under this key, too.
"""

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
from droplora_jax.data.formats.conversation import (
    CALLS,
    conversation,
    is_learnt,
    messages_of,
    role_of,
)
from droplora_jax.data.formats.messages import message_turn
from droplora_jax.data.formats.tools import calls_of
from droplora_jax.data.record import Fields

ROLES = {
    "system": "system",
    "human": USER,
    "user": USER,
    "gpt": ASSISTANT,
    "assistant": ASSISTANT,
    **dict.fromkeys(CALLS, ASSISTANT),
    "observation": TOOL,
    "tool": TOOL,
    "tool_response": TOOL,
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
        return message_turn(message)
    name, role = role_of(message, "from", ROLES)
    value = text_of(message, "value", may_be_empty=role != ASSISTANT)
    learnt = is_learnt(message, role)
    if name in CALLS:
        return Turn(ASSISTANT, None, calls_of("value", value), learnt=learnt)
    return Turn(role, value, learnt=learnt)


SHAREGPT = Format(("conversations",), "chat", convert, optional=("system", "tools"))
