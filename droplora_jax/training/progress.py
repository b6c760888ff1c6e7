"""The progress of a run: a bar in a terminal, plain lines elsewhere."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from typing import Any

from rich.console import Console

from droplora_jax.core.console import progress as console_progress
from droplora_jax.core.console import say
from droplora_jax.training.metrics_log import ACCURACY, UNREAD

Show = Callable[[int, Mapping[str, Any] | None], None]


@contextmanager
def progress(console: Console, *, start: int, total: int) -> Iterator[Show]:
    """Yields `show(step, row)`, called after every step; `row` holds the numbers when logged."""
    if not console.is_terminal:
        yield lambda step, row: say(console, f"step {step}/{total}  {_line(row)}") if row else None
        return
    bar = console_progress(console, "step", total=total, done=start, note="compiling")
    with bar as advance:
        shown = start

        def show(step: int, row: Mapping[str, Any] | None) -> None:
            nonlocal shown
            note = _line({**row, "seconds_left": None}) if row else None
            advance(step - shown, note)
            shown = step

        yield show


def _line(row: Mapping[str, Any]) -> str:
    parts = []
    if "eval_loss" in row:
        parts.append(f"evaluation loss {row['eval_loss']:.4f}")
    for name, value in row.items():
        if name.startswith(ACCURACY):
            task = name.removeprefix(ACCURACY)
            unread = row.get(f"{UNREAD}{task}")
            parts.append(f"{task} {value:.1%}" + (f" ({unread:.0f} unread)" if unread else ""))
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
