"""HumanEval (arXiv 2107.03374): a function to write after its docstring, and tests for it."""

from __future__ import annotations

from collections.abc import Sequence

from droplora_jax.core.errors import InputError
from droplora_jax.data.formats.base import text_of
from droplora_jax.inference.sandbox.runner import run_program
from droplora_jax.inference.task import Example, Outcome, Record, Task
from droplora_jax.inference.tasks import code


def convert(record: Record) -> Example:
    problem, name = text_of(record, "prompt"), text_of(record, "entry_point")
    if f"def {name}(" not in problem:
        raise InputError(f"prompt does not define the entry_point {name!r}")
    return {
        "id": text_of(record, "task_id"),
        "prompt": problem,
        "entry_point": name,
        "test": text_of(record, "test"),
    }


def prompt(example: Example, said: Sequence[str] = ()) -> str:
    return code.prompt(example["prompt"])


def program(example: Example, completion: str) -> str | None:
    """What a completion makes of the problem: the function as a whole, or the body of it."""
    problem, name = example["prompt"], example["entry_point"]
    whole = code.definition(completion, {name})
    if whole is not None:
        return problem[: problem.index(f"def {name}(")] + whole
    head = problem.rstrip("\n") + "\n"
    rest = code.body(completion, head)
    return None if rest is None else head + rest


def score(example: Example, completion: str) -> Outcome:
    extracted, name = program(example, completion), example["entry_point"]
    if extracted is None:
        return Outcome(None, False, f"holds neither {name} nor a body of it")
    ending = run_program(f"{extracted}\n\n{example['test']}\n\ncheck({name})\n")
    return Outcome(extracted, ending.passed, ending.reason)


HUMANEVAL = Task("humaneval", convert, prompt, score, max_new_tokens=512, runs_code=True)
