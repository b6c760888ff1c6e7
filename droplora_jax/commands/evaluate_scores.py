"""Scores of a model on test sets: what `droplora evaluate` asks, keeps and reports.

Every row is written down as soon as it is known, into a file beside the output; the same command
carries on from there.
"""

from __future__ import annotations

import difflib
import json
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from rich.box import SIMPLE_HEAD
from rich.console import Console
from rich.table import Table

from droplora_jax.commands.options import ModelRef, TaskOptions
from droplora_jax.core.console import progress, say
from droplora_jax.core.errors import InputError
from droplora_jax.core.files import check_absent, write_file
from droplora_jax.core.partial_output import Partial
from droplora_jax.data.data_file import local
from droplora_jax.data.templates.base import Document, Piece
from droplora_jax.data.tokenization import encode_prompts
from droplora_jax.inference.generator import Generator
from droplora_jax.inference.scoring import (
    Complete,
    Result,
    Row,
    ask,
    check_code,
    collected,
    sampling_of,
)
from droplora_jax.inference.task import Example, Task
from droplora_jax.inference.tasks import TASKS
from droplora_jax.inference.tasks.mt_bench import MT_BENCH, answers
from droplora_jax.runs.open_model import ModelFiles


@dataclass(frozen=True)
class Asked:
    """A task, the file it is asked from, and its examples."""

    task: Task
    file: str
    sha256: str
    examples: list[Example]

    def own(self, rows: Iterable[Row]) -> list[Row]:
        """The rows that belong to this task."""
        own = (row for row in rows if row["task"] == self.task.name)
        return [{key: value for key, value in row.items() if key != "task"} for row in own]


def evaluate_files(
    tasks: Sequence[str],
    output: Path,
    source: ModelRef,
    options: TaskOptions,
    console: Console,
) -> None:
    """Score a model on files, and write `output`: a JSON with every example's row.

    MT-bench's answers also go into a file of their own beside it, for FastChat's judge.

    Raises:
      InputError: names the task, or the file and the row; or what is there already.
    """
    check_absent(output)
    asked = [_asked(task, options) for task in tasks]
    names = [each.task.name for each in asked]
    if twice := sorted({name for name in names if names.count(name) > 1}):
        raise InputError(f"--task {twice[0]}: given twice; one file a task")
    judged = output.with_name(f"{output.stem}.mt_bench.jsonl")
    if MT_BENCH.name in names:
        check_absent(judged)
    files = source.find()
    partial = Partial(output, _settings(source, files, options, asked))
    if any(missing(each, partial.rows) for each in asked):
        if partial.rows:
            say(console, f"carrying on behind {len(partial.rows)} rows of {partial.file}")
        generator = _opened(source, files, options, asked)
        _ask_all(options, asked, partial, generator, console)
    results = [collected(each.task, each.examples, each.own(partial.rows)) for each in asked]
    if MT_BENCH.name in names:
        at = names.index(MT_BENCH.name)
        rows = answers(asked[at].examples, results[at].rows, model_id=output.stem)
        write_file(judged, "".join(json.dumps(row) + "\n" for row in rows))
    write_file(output, json.dumps(_report(partial.settings, asked, results), indent=2) + "\n")
    partial.remove()
    console.print(table(results))
    say(console, f"{output}: scores, and all {sum(len(r.rows) for r in results)} rows")


def missing(asked: Asked, rows: Iterable[Row]) -> list[Example]:
    """The examples that have no row yet."""
    done = {row["id"] for row in asked.own(rows)}
    return [example for example in asked.examples if example["id"] not in done]


def table(results: Sequence[Result]) -> Table:
    """One line a task, and the mean of several accuracies.

    `unread` counts the completions in which the task found no answer.
    """
    shown = Table(box=SIMPLE_HEAD, padding=(0, 1, 0, 0))
    shown.add_column("task", overflow="fold")
    for column in ("examples", "right", "unread", "accuracy", "95% interval"):
        shown.add_column(column, justify="right")
    for result in results:
        count = f"{len(result.rows):,}"
        if result.accuracy is None or result.interval is None:
            shown.add_row(result.task, count, "", "", "", "for a judge")
            continue
        low, high = result.interval
        interval = f"{low:.2%} .. {high:.2%}"
        right, unread = f"{result.right:,}", f"{result.unread:,}"
        shown.add_row(result.task, count, right, unread, f"{result.accuracy:.2%}", interval)
    scores = [result.accuracy for result in results if result.accuracy is not None]
    if len(scores) > 1:
        shown.add_section()
        shown.add_row("mean", "", "", "", f"{sum(scores) / len(scores):.2%}", "")
    return shown


def _asked(given: str, options: TaskOptions) -> Asked:
    name, _, file = given.partition("=")
    if name not in TASKS:
        near = difflib.get_close_matches(name, TASKS, n=1)
        hint = f"did you mean {near[0]!r}? " if near else ""
        raise InputError(f"--task {name!r}: no such task; {hint}There are {', '.join(TASKS)}")
    if not file:
        raise InputError(f"--task {given}: needs the file of its examples: {name}=FILE")
    task = TASKS[name]
    check_code(task, options.run_code)
    examples = task.read(file)
    return Asked(task, file, local(file).sha256(), examples[: options.limit])


def _settings(
    source: ModelRef, files: ModelFiles, options: TaskOptions, asked: Sequence[Asked]
) -> dict[str, Any]:
    """What the rows depend on. The size of a batch is not among it."""
    return {
        **asdict(source),
        "adapter": list(source.adapter),
        "files": files.fingerprint(),
        "limit": options.limit,
        "max_new_tokens": options.max_new_tokens,
        "task_files": {each.task.name: each.sha256 for each in asked},
    }


def _opened(
    source: ModelRef, files: ModelFiles, options: TaskOptions, asked: Sequence[Asked]
) -> Complete:
    """The model, after a look at whether every first prompt and its completion fit into it."""
    opened = source.load(files)
    generator = Generator(opened.model, opened.tokenizer, batch_size=options.batch_size)
    for each in asked:
        sampling = sampling_of(each.task, options.max_new_tokens)
        prompts = [each.task.prompt(example, ()) for example in each.examples]
        documents = [Document((Piece(prompt, False),)) for prompt in prompts]
        encoded = encode_prompts(documents, opened.tokenizer)
        for example, ids in zip(each.examples, encoded, strict=True):
            generator.check(f"{each.file}, {each.task.name} {example['id']}", ids, sampling)
    return generator


def _ask_all(
    options: TaskOptions,
    asked: Sequence[Asked],
    partial: Partial,
    complete: Complete,
    console: Console,
) -> None:
    for each in asked:
        left, total = missing(each, partial.rows), len(each.examples)
        with progress(console, each.task.name, total=total, done=total - len(left)) as advance:
            for row in _rows(each, left, complete, options):
                partial.write({"task": each.task.name, **row})
                advance()


def _rows(
    asked: Asked, left: Sequence[Example], complete: Complete, options: TaskOptions
) -> Iterator[Row]:
    try:
        yield from ask(
            asked.task,
            left,
            complete,
            batch_size=options.batch_size,
            max_new_tokens=options.max_new_tokens,
            run_code=options.run_code,
        )
    except InputError as error:
        raise InputError(f"{asked.task.name}, {asked.file}: {error}") from error


def _report(
    settings: Mapping[str, Any], asked: Sequence[Asked], results: Sequence[Result]
) -> dict[str, Any]:
    tasks = {
        each.task.name: {
            "file": each.file,
            "sha256": each.sha256,
            "examples": len(result.rows),
            "right": result.right if result.accuracy is not None else None,
            "unread": result.unread if result.accuracy is not None else None,
            "accuracy": result.accuracy,
            "interval_95": result.interval,
            "max_new_tokens": settings["max_new_tokens"] or each.task.max_new_tokens,
            "rows": result.rows,
        }
        for each, result in zip(asked, results, strict=True)
    }
    own = ("model", "adapter", "step", "dtype", "quantize", "limit")
    return {**{key: settings[key] for key in own}, "tasks": tasks}
