"""The progress of a run: a bar in a terminal, plain lines elsewhere."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from typing import Any

from rich.console import Console
from rich.progress import (
    BarColumn,
    MofNCompleteColumn,
    Progress,
    TextColumn,
    TimeRemainingColumn,
)

from droplora_jax.core.console import say
from droplora_jax.training.metrics_log import ACCURACY

Show = Callable[[int, Mapping[str, Any] | None], None]


@contextmanager
def progress(console: Console, *, start: int, total: int) -> Iterator[Show]:
    """Yields `show(step, row)`, called after every step; `row` holds the numbers when logged."""
    if not console.is_terminal:
        yield lambda step, row: say(console, f"step {step}/{total}  {_line(row)}") if row else None
        return
    columns = (
        TextColumn("step"),
        MofNCompleteColumn(),
        BarColumn(),
        TextColumn("{task.fields[line]}"),
        TimeRemainingColumn(),
        TextColumn("left"),
    )
    with Progress(*columns, console=console) as bar:
        task = bar.add_task("", total=total, completed=start, line="compiling")

        def show(step: int, row: Mapping[str, Any] | None) -> None:
            bar.update(task, completed=step)
            if row:
                bar.update(task, line=_line({**row, "seconds_left": None}))

        yield show


def _line(row: Mapping[str, Any]) -> str:
    parts = []
    if "eval_loss" in row:
        parts.append(f"evaluation loss {row['eval_loss']:.4f}")
    parts += [
        f"{name.removeprefix(ACCURACY)} {value:.1%}"
        for name, value in row.items()
        if name.startswith(ACCURACY)
    ]
    if "loss" in row:
        parts.append(f"loss {row['loss']:.4f}")
    if "tokens_per_second" in row:
        parts.append(f"{row['tokens_per_second']:,.0f} tokens/s")
    if row.get("seconds_left") is not None:
        parts.append(f"{_clock(row['seconds_left'])} left")
    return "  ".join(parts)


def _clock(seconds: float) -> str:
    minutes, seconds = divmod(round(seconds), 60)
    hours, minutes = divmod(minutes, 60)
    return f"{hours}:{minutes:02}:{seconds:02}" if hours else f"{minutes}:{seconds:02}"
