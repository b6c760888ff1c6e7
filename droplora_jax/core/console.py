"""Plain lines for the terminal, and an example with its trained text marked."""

from __future__ import annotations

import re
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Protocol, runtime_checkable

from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn
from rich.text import Text

_SHOWN = 500  # characters at either end of a long text
_CONTROL = re.compile(r"[\x00-\x08\x0b-\x1f\x7f]")  # characters that control a terminal


@runtime_checkable
class Advance(Protocol):
    """Moves a bar by `count` items; `note` stands beside it until there is another."""

    def __call__(self, count: int = 1, note: str | None = None) -> None: ...


def say(console: Console, text: str) -> None:
    """Print plain text; paths are not broken, and nothing is read as markup."""
    console.print(Text(text), soft_wrap=True)


@contextmanager
def progress(
    console: Console, name: str, *, total: int, done: int = 0, note: str = ""
) -> Iterator[Advance]:
    """A bar in a terminal, nothing elsewhere; yields `advance()`, called after every item."""
    columns = (
        TextColumn(name),
        MofNCompleteColumn(),
        BarColumn(),
        TextColumn("{task.fields[note]}"),
        TimeRemainingColumn(),
        TextColumn("left"),
    )
    with Progress(*columns, console=console, disable=not console.is_terminal) as bar:
        task = bar.add_task("", total=total, completed=done, note=note)

        def advance(count: int = 1, note: str | None = None) -> None:
            bar.update(task, advance=count)
            if note is not None:
                bar.update(task, note=note)

        yield advance


def example(console: Console, spans: list[tuple[str, bool]]) -> None:
    """Print a decoded example; trained text is coloured, or marked where there is no colour.

    The middle of a long span is left out.

    Args:
      spans: (text, whether it is trained on), in order.
    """
    colour = "green" if console.is_terminal else "[[marked]]"
    say(console, f"one example, what is trained on {colour}:")
    text = Text()
    for part, trained in spans:
        shown = _CONTROL.sub(lambda match: f"\\x{ord(match[0]):02x}", _shortened(part))
        marked = f"[[{shown}]]" if trained and not console.is_terminal else shown
        text.append(marked, style="bold green" if trained else "dim")
    console.print(text, soft_wrap=True)


def _shortened(text: str) -> str:
    left_out = len(text) - 2 * _SHOWN
    if left_out < _SHOWN // 2:
        return text
    return f"{text[:_SHOWN]} ... {left_out:,} characters ... {text[-_SHOWN:]}"
