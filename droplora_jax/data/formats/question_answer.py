"""A question and its worked answer, as in GSM8K."""

from __future__ import annotations

from droplora_jax.data.formats.base import Example, Format, check_context, text_of
from droplora_jax.data.formats.dialogue import BEFORE, dialogue
from droplora_jax.data.record import Fields


def convert(record: Fields) -> Example:
    check_context(record, "instruction: question, input: context, output: answer")
    return dialogue(record, text_of(record, "question"), text_of(record, "answer"))


QUESTION_ANSWER = Format(("question", "answer"), "alpaca", convert, optional=BEFORE)
