"""Plain lines for the terminal, and an example with its trained text marked."""

from __future__ import annotations

import re

from rich.console import Console
from rich.text import Text

_SHOWN = 500  # characters at either end of a long text
_CONTROL = re.compile(r"[\x00-\x08\x0b-\x1f\x7f]")  # characters that control a terminal


def say(console: Console, text: str) -> None:
    """Print plain text; paths are not broken, and nothing is read as markup."""
    console.print(Text(text), soft_wrap=True)


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
