"""What the formats of one question and one answer share: what may stand before the question."""

from __future__ import annotations

from droplora_jax.core.errors import InputError
from droplora_jax.data.formats.base import (
    ASSISTANT,
    USER,
    Example,
    Turn,
    check_unicode,
    exchange,
    json_of,
    pass_over,
    system_of,
)
from droplora_jax.data.formats.tools import tools_of
from droplora_jax.data.record import Fields

BEFORE = ("system", "history", "tools")  # the optional keys that `dialogue` reads


def dialogue(record: Fields, prompt: str, response: str, input: str = "") -> Example:
    """An example of a prompt and a response, and of what the record has before them.

    That is a `system` message, a `history` of earlier questions and answers, which are learnt, too,
    and `tools`.

    Raises:
      InputError: one of them is not as it should be.
    """
    before = (*system_of(record), *_history(record))
    tools = tools_of(record.get("tools"))
    if not before:
        return Example(exchange(prompt, response).turns, input, tools=tools)
    question = f"{prompt}\n{input}" if input else prompt
    return Example((*before, *exchange(question, response).turns), tools=tools)


def _history(record: Fields) -> list[Turn]:
    value = json_of(record.get("history"))
    if value is None or value == "":
        return []
    turns = []
    for number, pair in enumerate(value if isinstance(value, list) else [value], 1):
        if not isinstance(pair, list) or len(pair) != 2 or not _are_texts(pair):
            raise InputError(
                f"history: number {number} must be a list of a question and its answer, is "
                f"{pair!r:.60}; {pass_over('history')}"
            )
        question, answer = pair
        check_unicode("history", question + answer)
        turns += [Turn(USER, question), Turn(ASSISTANT, answer)]
    return turns


def _are_texts(values: list[object]) -> bool:
    return all(isinstance(value, str) and value.strip() for value in values)
