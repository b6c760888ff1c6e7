"""MT-bench (arXiv 2306.05685): two questions in a row, whose answers a judge scores elsewhere."""

from __future__ import annotations

import time
import uuid
from collections.abc import Iterable, Sequence

from droplora_jax.core.errors import InputError
from droplora_jax.data.formats.wrapped import TASK
from droplora_jax.inference.task import Example, Outcome, Record, Task

TURNS = 2
TURN = "### Instruction:\n{question}\n\n### Response:"


def convert(record: Record) -> Example:
    for key in ("question_id", "turns"):
        if key not in record:
            raise InputError(f"{key} is missing")
    turns = record["turns"]
    texts = isinstance(turns, list) and all(isinstance(turn, str) and turn for turn in turns)
    if not texts or len(turns) != TURNS:
        raise InputError(f"turns must be a list of {TURNS} questions, is {turns!r:.60}")
    number = record["question_id"]
    return {"id": str(number), "question_id": number, "turns": turns}


def prompt(example: Example, said: Sequence[str] = ()) -> str:
    """The conversation so far and the next question, as the authors of DropLoRA wrap them."""
    head = TASK + ". Write a response that appropriately completes the request."
    parts = [head]
    for question, answer in zip(example["turns"], [*said, ""], strict=False):
        parts.append(TURN.format(question=question) + answer.rstrip())
    return "\n\n".join(parts)


def score(example: Example, completion: str) -> Outcome:
    return Outcome(completion.strip(), None)


def answers(
    examples: Iterable[Example], rows: Iterable[Record], model_id: str
) -> list[dict[str, object]]:
    """The rows of a result as FastChat's judge reads them, one JSON object a question."""
    return [
        {
            "question_id": example["question_id"],
            "answer_id": uuid.uuid4().hex,
            "model_id": model_id,
            "choices": [{"index": 0, "turns": [turn.strip() for turn in row["turns"]]}],
            "tstamp": time.time(),
        }
        for example, row in zip(examples, rows, strict=True)
    ]


MT_BENCH = Task("mt_bench", convert, prompt, score, max_new_tokens=1024, turns=TURNS, judged=True)
