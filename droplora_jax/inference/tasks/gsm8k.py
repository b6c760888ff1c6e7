"""GSM8K (arXiv 2110.14168): word problems whose answer is a whole number.

A row has a `question` and an `answer` that ends with `#### 18`.
"""

from __future__ import annotations

import re
from collections.abc import Iterator, Sequence
from decimal import Decimal

from droplora_jax.core.errors import InputError
from droplora_jax.data.formats.base import text_of
from droplora_jax.data.templates import alpaca
from droplora_jax.inference.task import Example, Outcome, Record, Task
from droplora_jax.inference.tasks.final_answer import (
    HASHES,
    PHRASE,
    PHRASE_WITH_COLON,
    behind,
    boxed,
)

NUMBER = re.compile(
    r"(?P<sign>[-+\u2212])?(?:\\?[$\u20ac\u00a3\u00a5\u20b9])?(?P<inner>[-+\u2212])?"
    r"(?P<above>(?:\d+(?:,\d{3})+|\d+)?(?:\.\d+|(?<=\d)))(?:/(?P<below>\d+))?"
)
# The ways of LaTeX to write 1,018 and 36/2.
LATEX = ((re.compile(r"\{,\}|,\\!"), ","), (re.compile(r"\\[dt]?frac\{(\d+)\}\{(\d+)\}"), r"\1/\2"))


def convert(record: Record) -> Example:
    answer = text_of(record, "answer")
    number = _first(behind(HASHES, answer))
    if number is None:
        raise InputError(f"answer has no number behind ####: ...{answer[-40:]!r}")
    return {"instruction": text_of(record, "question"), "answer": str(number)}


def prompt(example: Example, said: Sequence[str] = ()) -> str:
    return alpaca.steps_prompt(example["instruction"])


def score(example: Example, completion: str) -> Outcome:
    number = answer_in(completion)
    extracted = None if number is None else str(number)
    return Outcome(extracted, extracted == example["answer"])


def answer_in(completion: str) -> int | None:
    """The final answer, rounded, in the first of the forms of `final_answer` that has a number."""
    return _first(_places(completion))


def first_number(text: str) -> int | None:
    """The first number in a text, rounded.

    Fractions, thousands' commas and a sign before a currency are understood.
    """
    for pattern, replacement in LATEX:
        text = pattern.sub(replacement, text)
    found = NUMBER.search(text)
    if found is None:
        return None
    above, below = found["above"].replace(",", ""), found["below"] or "1"
    if not int(below):
        return None
    negative = (found["sign"] or found["inner"] or "+") != "+"
    return round(Decimal(above) / Decimal(below)) * (-1 if negative else 1)


def _places(completion: str) -> Iterator[str]:
    yield from behind(PHRASE_WITH_COLON, completion)
    yield from behind(HASHES, completion)
    yield boxed(completion) or ""
    yield from behind(PHRASE, completion)


def _first(texts: Iterator[str]) -> int | None:
    numbers = (first_number(text) for text in texts)
    return next((number for number in numbers if number is not None), None)


GSM8K = Task("gsm8k", convert, prompt, score, max_new_tokens=512)
