r"""Where a completion of a mathematical problem says its final answer.

There are four forms, which are tried in this order:

1. behind "The answer is:", with a colon, as the published results are read;
2. behind `####`, as GSM8K's own answers end (MATH has no such form);
3. in the last `\boxed{}`, as MATH's own solutions end;
4. behind "the answer is" without a colon.

Where a form occurs several times the last counts, because a model may correct itself.
"""

from __future__ import annotations

import re
from collections.abc import Iterator

PHRASE_WITH_COLON = re.compile(r"\banswer is\**\s*:", re.IGNORECASE)
PHRASE = re.compile(r"\banswer is\b(?!\**\s*:)", re.IGNORECASE)
# With a number right behind it. A heading of Markdown, `#### Step 1` or `#### 1. Add`, is none.
HASHES = re.compile(r"####(?!\s*\d+[.):]\s+[^\W\d])(?=[^\w\n]*\d)")

# The first thing in a sentence or on a line, and the only one: an expression in math delimiters.
_DISPLAYED = re.compile(
    r"(?:\$\$.+?\$\$|\\\[.+?\\\]|\\\(.+?\\\)|\$(?:\\.|[^$\\])+\$)(?=[\s*]*(?:[.,;\n]|$))", re.DOTALL
)
# A line; what stands between \begin and \end may go over several.
_LINE = re.compile(r"(?:\\begin\{(\w+)\}(?s:.*?)\\end\{\1\}|.)*")
_SENTENCE_ENDS = re.compile(r"\.(?=\s|$)")
_DELIMITERS = re.compile(r"(?<!\\)(?:\\[()\[\]]|\$)")


def behind(marker: re.Pattern[str], text: str) -> Iterator[str]:
    """What follows each marker up to the next, the last one first."""
    return reversed(marker.split(text)[1:])


def boxed(text: str) -> str | None:
    """What the last `\\boxed{...}` (or `\\fbox{...}`, or `\\boxed 5`) holds; None without one."""
    found = list(re.finditer(r"\\(?:boxed|fbox)\s*", text))
    if not found:
        return None
    rest = text[found[-1].end() :]
    if not rest.startswith("{"):
        return rest.split("$")[0].strip() or None
    depth = 0
    for at, character in enumerate(rest):
        depth += {"{": 1, "}": -1}.get(character, 0)
        if depth == 0:
            return rest[1:at].strip()
    return None


def expression(text: str) -> str | None:
    r"""The expression that a text begins with; None if there is nothing.

    It goes to the end of its sentence or line, or of its delimiters where it begins with some. A
    model that boxes an answer means what is in the box.

    >>> expression(r" \(x = 2\). I hope that it is correct.")
    'x = 2'
    """
    text = text.strip().lstrip("*").lstrip()
    displayed = _DISPLAYED.match(text)
    if displayed:
        text = displayed.group()
    else:
        line = _LINE.match(text)
        text = _SENTENCE_ENDS.split(line.group() if line else "")[0]
    inner = boxed(text)
    return without_delimiters(text if inner is None else inner) or None


def without_delimiters(text: str) -> str:
    r"""A text without `$`, `$$`, `\(`, `\)`, `\[` and `\]`, and without a full stop at its end."""
    return _DELIMITERS.sub("", text).strip().rstrip("*").removesuffix(".").strip()
