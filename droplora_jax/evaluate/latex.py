"""When two LaTeX answers are the same, as results on MATH count it: by their normal form."""

from __future__ import annotations

import re

# In this order: what doesn't matter is taken out, and what has two spellings gets one.
REWRITES: tuple[tuple[str, str], ...] = (
    (r"\n|\\!", ""),
    (r"\\\\", r"\\"),  # a new line in a matrix
    (r"\\[td]frac", r"\\frac"),
    (r"\\(?:left|right)(?![a-z])", ""),
    (r"\^\{\\circ\}|\^\\circ", ""),
    (r"\\\$|\\%", ""),
    (r"\\text\{ .*$", ""),  # a unit behind the number
    (r"(^|[ {])\.(?=\d)", r"\g<1>0."),
    (r"^[^=]{0,2}=(?=[^=]*$)", ""),  # x = 5
    (r" ", ""),
    (r"\\sqrt([^{\\\[])", r"\\sqrt{\1}"),
    (r"\\frac(\w)", r"\\frac{\1}"),
    (r"(\\frac\{(?:[^{}]|\{[^{}]*\})*\})(\w)", r"\1{\2}"),
    (r"^0\.5$", r"\\frac{1}{2}"),
    (r"^(-?\d+)/(-?\d+)$", r"\\frac{\1}{\2}"),
)


def normalised(answer: str) -> str:
    """The normal form of an answer."""
    text = answer.strip()
    for pattern, replacement in REWRITES:
        text = re.sub(pattern, replacement, text)
    return text


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
