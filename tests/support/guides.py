"""README files: their links, and their blocks of commands and Python."""

from __future__ import annotations

import re
import shlex
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

ROOT = Path(__file__).parents[2]
FENCE = re.compile(
    r"(?:^<!-- not run: (?P<why>[^\n]+?) -->\n)?(?:^<!-- \w+ -->\n)?"
    r"^```(?P<kind>\w*)\n(?P<text>.*?)^```$",
    re.M | re.S,
)
LINK = re.compile(r"\[[^\]\n]*\]\((?!https?:)([^)\s]+)\)")
HEADING = re.compile(r"^#+ (.+)$", re.M)


def guides() -> list[Path]:
    """Every README.md of the project."""
    folders = ("droplora_jax", "examples", "findings", "tests")
    inner = (file for folder in folders for file in (ROOT / folder).rglob("README.md"))
    return [ROOT / "README.md", *sorted(inner)]


@dataclass(frozen=True)
class Block:
    """A fenced block; `why` it is not run, where a comment before it says so."""

    file: Path
    line: int
    kind: str
    text: str
    why: str | None

    def commands(self) -> Iterator[list[str]]:
        """The words of every command of the `droplora` program in a block of `sh`."""
        for line in self.text.replace("\\\n", " ").splitlines():
            words = shlex.split(line, comments=True)
            while words and re.fullmatch(r"[A-Z_]+=\S*", words[0]):
                words.pop(0)
            if words and words[0] == "droplora":
                yield words[1:]


def blocks(file: Path, kind: str) -> list[Block]:
    text = file.read_text(encoding="utf-8")
    return [
        Block(file, text.count("\n", 0, match.start()) + 1, kind, match["text"], match["why"])
        for match in FENCE.finditer(text)
        if match["kind"] == kind
    ]


def broken_links(file: Path) -> list[str]:
    """Relative links of a guide that lead nowhere: no such file, or no such heading in it."""
    text = re.sub(r"^```.*?^```$", "", file.read_text(encoding="utf-8"), flags=re.M | re.S)
    broken = []
    for link in LINK.findall(text):
        path, _, anchor = link.partition("#")
        target = (file.parent / path).resolve() if path else file
        if not target.exists() or (anchor and anchor not in _anchors(target)):
            broken.append(link)
    return broken


def _anchors(file: Path) -> set[str]:
    headings = HEADING.findall(file.read_text(encoding="utf-8"))
    return {re.sub(r"[^\w\- ]", "", heading).lower().replace(" ", "-") for heading in headings}
