r"""MATH (arXiv 2103.03874): competition problems whose answer is a LaTeX expression.

A row has a `problem` and an `answer`, or a `solution` with the answer in its last `\boxed{}`; or,
as the authors of DropLoRA feed them, the wrapped `instruction` and the answer as `output`.
"""

from __future__ import annotations

import re
from collections.abc import Iterator, Sequence

from droplora_jax.core.errors import InputError
from droplora_jax.data.formats.base import text_of
from droplora_jax.data.formats.wrapped import is_wrapped
from droplora_jax.data.templates import alpaca
from droplora_jax.inference.task import Example, Outcome, Record, Task
from droplora_jax.inference.tasks.final_answer import (
    PHRASE,
    PHRASE_WITH_COLON,
    behind,
    boxed,
    expression,
    without_delimiters,
)


def convert(record: Record) -> Example:
    if "problem" in record:
        instruction = text_of(record, "problem")
        key = "answer" if "answer" in record else "solution"
    elif "instruction" in record:
        instruction, key = text_of(record, "instruction"), "output"
    else:
        raise InputError("problem is missing (or instruction, with output)")
    text = text_of(record, key)
    answer = boxed(text)
    if answer is None:
        if key == "solution":
            raise InputError("solution has no \\boxed{} with the answer")
        answer = answer_in(text) or without_delimiters(text)
    return {"instruction": instruction, "answer": answer}


def prompt(example: Example, said: Sequence[str] = ()) -> str:
    instruction = example["instruction"]
    return instruction if is_wrapped(instruction) else alpaca.steps_prompt(instruction)


def score(example: Example, completion: str) -> Outcome:
    extracted = answer_in(completion)
    if extracted is None:
        return Outcome(None, False)
    return Outcome(extracted, normalised(extracted) == normalised(example["answer"]))


def answer_in(completion: str) -> str | None:
    """The final answer, in the first of the forms of `final_answer` that has one."""
    return next(filter(None, _answers(completion)), None)


def _answers(completion: str) -> Iterator[str | None]:
    yield from map(expression, behind(PHRASE_WITH_COLON, completion))
    yield boxed(completion)
    yield from map(expression, behind(PHRASE, completion))


MATH = Task("math", convert, prompt, score, max_new_tokens=1024)

# In this order: what doesn't matter is taken out, and what has two spellings gets one.
REWRITES: tuple[tuple[str, str], ...] = (
    (r"\n|\\!", ""),
    (r"\\\\", r"\\"),  # a new line in a matrix
    (r"\\[td]frac", r"\\frac"),
    (r"\\(?:left|right)(?![a-z])", ""),
    (r"\^\{\\circ\}|\^\\circ", ""),
    (r"\\\$|\\%", ""),
    (r"\\text\{ .*$", ""),  # a unit behind the number
    (r"(^|[ {])\.(?=\d)", r"\g<1>0."),
    (r"^[^=]{0,2}=(?=[^=]*$)", ""),  # x = 5
    (r" ", ""),
    (r"\\sqrt([^{\\\[])", r"\\sqrt{\1}"),
    (r"\\frac(\w)", r"\\frac{\1}"),
    (r"(\\frac\{(?:[^{}]|\{[^{}]*\})*\})(\w)", r"\1{\2}"),
    (r"^0\.5$", r"\\frac{1}{2}"),
    (r"^(-?\d+)/(-?\d+)$", r"\\frac{\1}{\2}"),
)


def normalised(answer: str) -> str:
    """The normal form of an answer."""
    text = answer.strip()
    for pattern, replacement in REWRITES:
        text = re.sub(pattern, replacement, text)
    return text
