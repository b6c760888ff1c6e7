"""Asks a model the examples of a task and scores what it says.

result = evaluate(TASKS["boolq"], examples, Generator(model, tokenizer), limit=200)
result.accuracy, result.interval
"""

from __future__ import annotations

import os
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, replace
from typing import Any, Protocol, runtime_checkable

from droplora_jax.core.errors import InputError
from droplora_jax.inference.config import Sampling
from droplora_jax.inference.task import Example, Task

Complete = Callable[[Sequence[str], Sampling], Sequence[str]]
Row = dict[str, Any]  # `id`, `prompt`, `completion`, `extracted`, `right`; `note`, `turns`


@runtime_checkable
class HasRoom(Protocol):
    """Completes prompts, and says how many new tokens it has room for behind each of them."""

    def room(self, prompts: Sequence[str]) -> list[int]: ...


@dataclass(frozen=True)
class Result:
    """What a task gave, its rows in the order of the examples."""

    task: str
    rows: tuple[Row, ...]

    @property
    def right(self) -> int:
        return sum(row["right"] is True for row in self.rows)

    @property
    def accuracy(self) -> float | None:
        """The share of right answers; None where a judge scores them."""
        judged = not self.rows or any(row["right"] is None for row in self.rows)
        return None if judged else self.right / len(self.rows)

    @property
    def unread(self) -> int:
        """How many completions had no answer that could be read; they are not right."""
        return sum(row["right"] is False and row["extracted"] is None for row in self.rows)

    @property
    def interval(self) -> tuple[float, float] | None:
        """Where the accuracy on many such examples lies with 95% confidence."""
        return None if self.accuracy is None else wilson(self.right, len(self.rows))


def evaluate(
    task: Task,
    examples: Sequence[Example],
    complete: Complete,
    *,
    limit: int | None = None,
    batch_size: int = 8,
    max_new_tokens: int | None = None,
    run_code: bool = False,
) -> Result:
    """Ask all examples, or the first `limit`.

    Args:
      complete: such as a `Generator`: prompts and how to go on from them, to completions.
      batch_size: how many prompts are given to it at once.
      max_new_tokens: default: the task's.
      run_code: allows a task to run what the model wrote (see `sandbox/runner.py`).

    Raises:
      InputError: the task would run code, and that is not allowed.
    """
    examples = examples[:limit]
    asked = ask(
        task,
        examples,
        complete,
        batch_size=batch_size,
        max_new_tokens=max_new_tokens,
        run_code=run_code,
    )
    return collected(task, examples, asked)


def collected(task: Task, examples: Sequence[Example], rows: Iterator[Row] | list[Row]) -> Result:
    """A result of rows in any order."""
    by_id = {row["id"]: row for row in rows}
    return Result(task.name, tuple(by_id[example["id"]] for example in examples))


def ask(
    task: Task,
    examples: Sequence[Example],
    complete: Complete,
    *,
    batch_size: int = 8,
    max_new_tokens: int | None = None,
    run_code: bool = False,
) -> Iterator[Row]:
    """A row for every example as soon as it is known, the longest prompts first.

    The first turn has to fit with all the tokens that are asked for. A later one, which stands
    behind answers of any length, gets the room that is left, and the row has a note.
    """
    check_code(task, run_code)
    sampling = sampling_of(task, max_new_tokens)
    ordered = sorted(examples, key=lambda example: -len(task.prompt(example, ())))
    # A program's own process does the work, so threads are enough to run several.
    with ThreadPoolExecutor(os.cpu_count() if task.runs_code else 1) as pool:
        for first in range(0, len(ordered), batch_size):
            batch = ordered[first : first + batch_size]
            prompts = [task.prompt(example, ()) for example in batch]
            said: list[tuple[str, ...]] = [(text,) for text in complete(prompts, sampling)]
            notes: list[tuple[str, ...]] = [()] * len(batch)
            for turn in range(2, task.turns + 1):
                prompts = [task.prompt(e, s) for e, s in zip(batch, said, strict=True)]
                rooms = _rooms(complete, prompts, sampling)
                completions = _in_rooms(complete, prompts, sampling, rooms)
                said = [(*s, c) for s, c in zip(said, completions, strict=True)]
                notes = [(*n, *_note(turn, r, sampling)) for n, r in zip(notes, rooms, strict=True)]
            yield from pool.map(lambda *asked: _row(task, *asked), batch, prompts, said, notes)


def sampling_of(task: Task, max_new_tokens: int | None = None) -> Sampling:
    """How a task is completed: greedily."""
    return Sampling(max_new_tokens=max_new_tokens or task.max_new_tokens, stop=task.stop)


def check_code(task: Task, allowed: bool) -> None:
    """Raise InputError if a task would run code that a model wrote, unless that is allowed."""
    if task.runs_code and not allowed:
        raise InputError(
            f"{task.name} runs code that the model writes; allow it with --run-code (run_code=True)"
        )


def wilson(right: int, count: int, confidence: float = 0.95) -> tuple[float, float]:
    """The score interval of a share (Wilson 1927), which also holds near 0 and 1."""
    from scipy.stats import binomtest

    found = binomtest(right, count).proportion_ci(confidence, method="wilson")
    return float(found.low), float(found.high)


def _rooms(complete: Complete, prompts: Sequence[str], sampling: Sampling) -> list[int]:
    """How many new tokens each prompt gets: those that are asked for, or all that there are."""
    asked = sampling.max_new_tokens
    if not isinstance(complete, HasRoom):
        return [asked] * len(prompts)
    return [min(max(room, 0), asked) for room in complete.room(prompts)]


def _in_rooms(
    complete: Complete, prompts: Sequence[str], sampling: Sampling, rooms: Sequence[int]
) -> list[str]:
    """Completions of the prompts, each within its own number of new tokens."""
    completions = [""] * len(prompts)
    for room in sorted(set(rooms) - {0}, reverse=True):
        places = [i for i, own in enumerate(rooms) if own == room]
        limited = replace(sampling, max_new_tokens=room)
        texts = complete([prompts[i] for i in places], limited)
        for i, text in zip(places, texts, strict=True):
            completions[i] = text
    return completions


def _note(turn: int, room: int, sampling: Sampling) -> tuple[str, ...]:
    """What a row says of a turn that got less room than the task asks for."""
    asked = sampling.max_new_tokens
    if room == asked:
        return ()
    return (f"turn {turn}: room for {room} of {asked} new tokens was left behind the turns before",)


def _row(
    task: Task, example: Example, prompt: str, said: Sequence[str], notes: Sequence[str]
) -> Row:
    outcome = task.score(example, said[-1])
    row = {
        "id": example["id"],
        "prompt": prompt,
        "completion": said[-1],
        "extracted": outcome.extracted,
        "right": outcome.right,
    }
    if "answer" in example:
        row["answer"] = example["answer"]
    if note := "; ".join(filter(None, (outcome.note, *notes))):
        row["note"] = note
    if task.turns > 1:
        row["turns"] = list(said)
    return row
