"""MBPP (arXiv 2108.07732): a small Python function to write, and assertions that it must pass.

A row has a `text` (or `prompt`), a `test_list`, and what the tests need first: `test_setup_code`
or `test_imports`. The test set is problems 11 to 510; the others, which are for prompts
and for training, are left out.
"""

from __future__ import annotations

import ast
import builtins
from collections.abc import Sequence

from droplora_jax.core.errors import InputError
from droplora_jax.data.formats.base import text_of
from droplora_jax.inference.sandbox.runner import run_program
from droplora_jax.inference.task import Example, Outcome, Record, Task
from droplora_jax.inference.tasks import code

TEST_SET = range(11, 511)


def convert(record: Record) -> Example | None:
    number = record.get("task_id")
    if not isinstance(number, int):
        raise InputError(f"task_id must be a number, is {number!r:.60}")
    if number not in TEST_SET:
        return None
    tests = _lines(record, "test_list")
    if not tests:
        raise InputError("test_list is empty")
    setup = [*_lines(record, "test_imports"), str(record.get("test_setup_code") or "")]
    return {
        "id": str(number),
        "problem": text_of(record, "text" if "text" in record else "prompt"),
        "setup": "\n".join(setup).strip(),
        "tests": "\n".join(tests),
        "names": sorted(called(tests)),
    }


def prompt(example: Example, said: Sequence[str] = ()) -> str:
    return code.prompt(f"{example['problem']}\nTest examples:\n{example['tests']}")


def score(example: Example, completion: str) -> Outcome:
    extracted = code.definition(completion, example["names"])
    if extracted is None:
        return Outcome(None, False, f"defines none of {', '.join(example['names'])}")
    ending = run_program(f"{extracted}\n\n{example['setup']}\n{example['tests']}\n")
    return Outcome(extracted, ending.passed, ending.reason)


def called(tests: Sequence[str]) -> set[str]:
    """The functions that assertions call, Python's own apart."""
    names = set()
    for test in tests:
        try:
            tree = ast.parse(test)
        except SyntaxError as error:
            raise InputError(f"test_list: {test!r:.60} is no Python ({error})") from error
        calls = (node.func for node in ast.walk(tree) if isinstance(node, ast.Call))
        names |= {function.id for function in calls if isinstance(function, ast.Name)}
    names -= set(dir(builtins))
    if not names:
        raise InputError("test_list calls no function")
    return names


def _lines(record: Record, key: str) -> list[str]:
    if key == "test_list" and key not in record:
        raise InputError(f"{key} is missing")
    value = record.get(key) or []
    if not isinstance(value, list) or not all(isinstance(line, str) for line in value):
        raise InputError(f"{key} must be a list of texts, is {value!r:.60}")
    return value


MBPP = Task("mbpp", convert, prompt, score, max_new_tokens=512, runs_code=True)
