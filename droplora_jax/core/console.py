"""What a person sees while a run goes on: a progress bar, or plain lines without a terminal."""

from __future__ import annotations

import re

from rich.console import Console
from rich.text import Text

_SHOWN = 500  # characters at either end of a long text
_CONTROL = re.compile(r"[\x00-\x08\x0b-\x1f\x7f]")  # what a terminal would obey


def say(console: Console, text: str) -> None:
    """One line of plain text, paths whole and nothing read as markup."""
    console.print(Text(text), soft_wrap=True)


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
