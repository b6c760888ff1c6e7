"""The data of a run: read, shown, made into batches, and known again when the run goes on."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Any, NamedTuple

from rich.console import Console

from droplora_jax.core import distributed
from droplora_jax.core.console import example, say
from droplora_jax.core.errors import InputError
from droplora_jax.data import holdout
from droplora_jax.data.batches import Batches
from droplora_jax.data.config import Place
from droplora_jax.data.data_file import local
from droplora_jax.data.load import load
from droplora_jax.data.preview import preview
from droplora_jax.data.report import Report
from droplora_jax.data.rows import Rows
from droplora_jax.hf.base import Base
from droplora_jax.runs import config_reader
from droplora_jax.runs.config import RunConfig
from droplora_jax.training.checkpoint import Record
from droplora_jax.training.config import TrainConfig
from droplora_jax.training.evaluation import Evaluation, best_key, check_prompts, tasks_of


class RunData(NamedTuple):
    """Training batches, what the run is evaluated on, and what its checkpoints record of it."""

    train: Batches
    evaluation: Evaluation
    record: Record


def read(config: RunConfig, base: Base, console: Console) -> RunData:
    """The data of a run; says what it holds, and shows one example.

    Raises:
      InputError: names a file or a row that is wrong; sequences longer than the base's positions.
    """
    if config.data.max_length > base.shape.max_positions:
        raise InputError(
            f"data.max_length={config.data.max_length}: the model is made for "
            f"{base.shape.max_positions} positions (max_position_embeddings in its config.json)"
        )
    load = partial(_rows, config=config, base=base, console=console)
    rows, report = load(config.data.train)
    reports = [report]
    held_out = None
    if config.data.valid:
        held_out, other = load(config.data.valid)
        reports.append(other)
    elif config.data.valid_fraction:
        rows, held_out = holdout.held_out(rows, config.data.valid_fraction, config.seed)
        say(console, f"{len(held_out):,} rows are held out for validation")
    train = _batches(config, rows, True)
    evaluation = _evaluation(config, held_out, base)
    say(console, _outlook(config, train, int(rows.lengths.sum())))
    example(console, preview(rows[0], base.tokenizer))
    record = {
        "config": config_reader.as_tree(config),
        "template": report.sources[0].template,
        "data": _record(reports, list(config.train.eval_tasks.values())),
    }
    return RunData(train, evaluation, record)


def _rows(
    sources: Place | Sequence[Place], config: RunConfig, base: Base, console: Console
) -> tuple[Rows, Report]:
    rows, report = load(sources, base.tokenizer, config.data)
    for line in report.lines():
        say(console, line)
    size = base.shape.vocab_size
    if rows.largest_id >= size:
        raise InputError(
            f"{', '.join(source.path for source in report.sources)}: token id {rows.largest_id} is "
            f"outside the model's vocabulary of {size}: the tokenizer in {config.model.path} is "
            "another model's"
        )
    return rows, report


def _evaluation(config: RunConfig, held_out: Rows | None, base: Base) -> Evaluation:
    train = config.train
    tasks = tasks_of(train.eval_tasks, train.eval_examples, train.eval_run_code)
    check_prompts(tasks, base.tokenizer, base.shape)
    return Evaluation(
        valid=None if held_out is None else _batches(config, held_out, False),
        tasks=tasks,
        tokenizer=base.tokenizer,
        batch_size=train.rows_per_pass,
        run_code=train.eval_run_code,
        best=best_key(train.best, held_out is not None, tuple(train.eval_tasks)),
    )


def _batches(config: RunConfig, rows: Rows, training: bool) -> Batches:
    return Batches(
        rows,
        batch_size=config.train.global_batch if training else config.train.rows_per_pass,
        seed=config.seed,
        shuffle=training,
        max_length=config.data.max_length,
        packing=config.data.fit,
        weights=config.data.weights if training else None,
    )


def total_steps(config: TrainConfig, batches: Batches) -> int:
    """The optimizer steps of a whole run."""
    return config.steps or batches.steps(config.epochs or 3.0)


def steps_before(saved: Record, config: TrainConfig, batches: Batches) -> int:
    """The optimizer steps that the whole run had when a checkpoint with this record was saved."""
    train = saved["config"]["train"]
    return total_steps(replace(config, steps=train["steps"], epochs=train["epochs"]), batches)


def _outlook(config: RunConfig, batches: Batches, tokens: int) -> str:
    """How full the lines are, and how long the run will be."""
    lines, size, packing = batches.sequences_per_epoch, config.train.global_batch, config.data.fit
    steps = total_steps(config.train, batches)
    return (
        f"{lines:,} lines of {batches.max_length:,} tokens an epoch, {batches.utilisation:.1%} full"
        + (f" ({packing})" if packing else "; data.packing=true lets rows share them")
        + f"\n{steps:,} steps of {size:,} lines: {steps * size / lines:,.2f} epochs of "
        f"{tokens:,} tokens"
    )


def _record(reports: Sequence[Report], task_files: Sequence[str]) -> Record:
    """What a checkpoint says of the data and of tasks' files: the run goes on with the same."""
    files = [(source.path, source.sha256) for report in reports for source in report.sources]
    files += [(path, local(path).sha256()) for path in task_files]
    return {
        "files": [{"path": path, "sha256": sha256} for path, sha256 in files],
        "rows": sum(report.kept for report in reports),
        "tokens": sum(report.tokens for report in reports),
    }


def check_same(saved: Record | None, now: Mapping[str, Any], folder: Path) -> None:
    """Raise InputError unless the data is what the run in a folder was trained on so far.

    Args:
      saved: the record of its newest checkpoint; None without one.
      now: `record["data"]` of what was read.
    """
    if not distributed.same(json.dumps(now, sort_keys=True).encode()):
        here = ", ".join(f"{file['path']} is {file['sha256'][:12]}" for file in now["files"])
        raise InputError(f"data: the files are not the same on all hosts (SHA-256; here {here})")
    if saved is None:
        return
    before = saved["data"]
    if changes := _changed_files(before["files"], now["files"]):
        raise InputError(
            f"{folder} holds a run on other data: {'; '.join(changes)} (SHA-256). "
            "Put it back to carry on, or name another output"
        )
    for what in ("rows", "tokens"):
        if before[what] != now[what]:
            raise InputError(
                f"{folder} holds a run on the same files, of which {before[what]:,} "
                f"{what} were made, and now {now[what]:,}: the tokenizer has changed, or this "
                "package. Put it back to carry on, or name another output"
            )


def _changed_files(old: Sequence[Mapping], new: Sequence[Mapping]) -> list[str]:
    """What became of the files of a run, in words; one may have another name."""
    if len(old) != len(new):
        before, after = ({file["path"] for file in files} for files in (old, new))
        gone = [f"{path} is gone" for path in sorted(before - after)]
        added = [f"{path} was not there" for path in sorted(after - before)]
        return gone + added or [f"{len(old)} files are {len(new)} now"]
    return [
        f"{now['path']} was {was['sha256'][:12]} and is {now['sha256'][:12]}"
        for was, now in zip(old, new, strict=True)
        if was["sha256"] != now["sha256"]
    ]
