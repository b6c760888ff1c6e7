"""GSM8K (arXiv 2110.14168): word problems whose answer is a whole number.

A row has a `question` and an `answer` that ends with `#### 18`.
"""

from __future__ import annotations

import re
from collections.abc import Sequence
from decimal import Decimal

from droplora_jax.core.errors import InputError
from droplora_jax.data.formats.base import text_of
from droplora_jax.data.templates import alpaca
from droplora_jax.inference.task import ANSWER, Example, Outcome, Record, Task, after_last

END = "####"
NUMBER = re.compile(r"[-+]?(?:\d+(?:,\d{3})+|\d+)?(?:\.\d+|(?<=\d))(?:/\d+)?")


def convert(record: Record) -> Example:
    answer = text_of(record, "answer")
    number = first_number(after_last(END, answer) or "")
    if number is None:
        raise InputError(f"answer has no number behind {END}: ...{answer[-40:]!r}")
    return {"instruction": text_of(record, "question"), "answer": str(number)}


def prompt(example: Example, said: Sequence[str] = ()) -> str:
    return alpaca.steps_prompt(example["instruction"])


def score(example: Example, completion: str) -> Outcome:
    number = first_number(after_last(ANSWER, completion) or "")
    extracted = None if number is None else str(number)
    return Outcome(extracted, extracted == example["answer"])


def first_number(text: str) -> int | None:
    """The first number in a text, rounded; fractions and thousands' commas are understood."""
    found = NUMBER.search(text)
    if found is None:
        return None
    above, _, below = found.group().replace(",", "").partition("/")
    if below and not int(below):
        return None
    return round(Decimal(above) / Decimal(below or 1))


GSM8K = Task("gsm8k", convert, prompt, score, max_new_tokens=512)
