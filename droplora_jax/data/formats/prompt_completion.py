"""A prompt, taken as it is, and its completion; or both as lists of messages."""

from __future__ import annotations

from droplora_jax.core.errors import InputError
from droplora_jax.data.formats.base import Example, Format, json_of, pass_over, text_of
from droplora_jax.data.formats.conversation import conversation, messages_of
from droplora_jax.data.formats.dialogue import BEFORE, dialogue
from droplora_jax.data.formats.messages import message_turn
from droplora_jax.data.record import Fields


def convert(record: Fields) -> Example:
    _check_wanted(record)
    prompt = text_of(record, "prompt", may_be_empty=True)
    return dialogue(record, prompt, text_of(record, "completion"))


def convert_messages(record: Fields) -> Example:
    """The conversation of both lists, of which the completion's answers are learnt."""
    _check_wanted(record)
    prompt, completion = (messages_of(record, key) for key in ("prompt", "completion"))
    return conversation(record, [*prompt, *completion], message_turn, given=len(prompt))


def _check_wanted(record: Fields) -> None:
    if record.get("label") is False:
        raise InputError(
            "label=False: the completion is marked as not wanted, and would be trained; "
            + pass_over("label")
        )


def _are_messages(value: object) -> bool:
    messages = json_of(value)
    if not isinstance(messages, list) or not messages:
        return False
    first = json_of(messages[0])
    return isinstance(first, dict) and "role" in first


PROMPT_COMPLETION = Format(("prompt", "completion"), "none", convert, optional=BEFORE)
PROMPT_MESSAGES = Format(
    ("prompt", "completion"),
    "chat",
    convert_messages,
    optional=("system", "tools"),
    telling=lambda record: all(_are_messages(record[key]) for key in ("prompt", "completion")),
)
