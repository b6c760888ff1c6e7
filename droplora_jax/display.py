"""What a person sees while a run goes on: a progress bar, or plain lines without a terminal."""

from __future__ import annotations

import re
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
from rich.text import Text

from droplora_jax.metrics import ACCURACY

_SHOWN = 500  # characters at either end of a long text
_CONTROL = re.compile(r"[\x00-\x08\x0b-\x1f\x7f]")  # what a terminal would obey
Show = Callable[[int, Mapping[str, Any] | None], None]


def say(console: Console, text: str) -> None:
    """One line of plain text, paths whole and nothing read as markup."""
    console.print(Text(text), soft_wrap=True)


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


def example(console: Console, spans: list[tuple[str, bool]]) -> None:
    """One decoded example; what is trained on stands out, by marks where there is no colour.

    Of a long span the middle is left out.
    """
    colour = "green" if console.is_terminal else "[[marked]]"
    say(console, f"one example, what is trained on {colour}:")
    text = Text()
    for part, trained in spans:
        shown = _CONTROL.sub(lambda found: f"\\x{ord(found[0]):02x}", _shortened(part))
        marked = f"[[{shown}]]" if trained and not console.is_terminal else shown
        text.append(marked, style="bold green" if trained else "dim")
    console.print(text, soft_wrap=True)


def _shortened(text: str) -> str:
    left_out = len(text) - 2 * _SHOWN
    if left_out < _SHOWN // 2:
        return text
    return f"{text[:_SHOWN]} ... {left_out:,} characters ... {text[-_SHOWN:]}"
