"""Eight sets of questions with a few answers to choose from (arXiv 2304.01933).

A row has an `instruction` that ends with the answers' format, and the `answer`; or, as the
authors of DropLoRA feed them, the wrapped `instruction` and the answer as `output`.
"""

from __future__ import annotations

import re
from collections.abc import Sequence

from droplora_jax.core.errors import InputError
from droplora_jax.data.formats.base import text_of
from droplora_jax.data.formats.wrapped import is_wrapped
from droplora_jax.data.templates import alpaca
from droplora_jax.inference.task import Example, Outcome, Record, Task


def task(name: str, *answers: str) -> Task:
    """The set of this name, whose answers are these words. The first one in a text counts."""
    pattern = re.compile("|".join(answers))

    def first(text: str) -> str | None:
        found = pattern.search(text)
        return found.group() if found else None

    def convert(record: Record) -> Example:
        key = "answer" if "answer" in record or "output" not in record else "output"
        answer = first(text_of(record, key))
        if answer is None:
            raise InputError(f"{key}={record[key]!r:.60} is none of {', '.join(answers)}")
        return {"instruction": text_of(record, "instruction"), "answer": answer}

    def score(example: Example, completion: str) -> Outcome:
        extracted = first(completion)
        return Outcome(extracted, extracted == example["answer"])

    return Task(name, convert, prompt, score, max_new_tokens=32)


def prompt(example: Example, said: Sequence[str] = ()) -> str:
    instruction = example["instruction"]
    return instruction if is_wrapped(instruction) else alpaca.prompt(instruction)


def numbered(word: str, count: int) -> tuple[str, ...]:
    return tuple(f"{word}{number}" for number in range(1, count + 1))


COMMONSENSE = (
    task("boolq", "true", "false"),
    task("piqa", *numbered("solution", 2)),
    task("social_i_qa", *numbered("answer", 5)),
    task("hellaswag", *numbered("ending", 4)),
    task("winogrande", *numbered("option", 2)),
    task("ARC-Easy", *numbered("answer", 5)),
    task("ARC-Challenge", *numbered("answer", 5)),
    task("openbookqa", *numbered("answer", 5)),
)
