"""The part of a completion that is the asked-for program, and the prompt that asks for one."""

from __future__ import annotations

import ast
import re
from collections.abc import Collection, Iterator

from droplora_jax.data.formats.wrapped import TASK

# With the white space that the published results were asked with.
PROMPT = (
    TASK + ". Write a response that appropriately completes the request.\n\n\n"
    "### Instruction:\nCreate a Python script for this problem:\n{problem}\n\n### Response:"
)
FENCED = re.compile(r"```[ \t]*\w*[ \t]*\n(.*?)(?:\n[ \t]*```|\Z)", re.DOTALL)
BEGINS = re.compile(r"(?:from|import|def|async|class|@\w)")
DEFINITIONS = (ast.FunctionDef, ast.AsyncFunctionDef, ast.ClassDef)
KEPT = (*DEFINITIONS, ast.Import, ast.ImportFrom, ast.Assign, ast.AnnAssign)


def prompt(problem: str) -> str:
    """The wrapped problem, indented with tabs as the published results were asked."""
    return PROMPT.format(problem=problem.rstrip("\n").replace("    ", "\t") + "\n")


def definition(completion: str, names: Collection[str]) -> str | None:
    """The code that defines the named functions; None where there is none.

    It may stand in a fenced block or between prose. Behind the last of the functions only further
    definitions are kept: no examples of use, and no tests of the model's own.
    """
    blocks = [match.group(1) for match in FENCED.finditer(completion)]
    for text in (*blocks, completion):
        for tree, source in _programs(text):
            last = _last_defined(tree, names)
            if last is not None:
                return _cut(tree, source, last)
    return None


def body(completion: str) -> str:
    """The rest of a function that was begun: all before the next line that is not indented."""
    fenced = FENCED.search(completion)
    text = (fenced.group(1) if fenced else completion).lstrip("\n")
    text = re.sub(r"^[ \t]+", lambda found: found.group().expandtabs(4), text, flags=re.MULTILINE)
    end = re.search(r"^\S", text, flags=re.MULTILINE)
    return text[: end.start()] if end else text


def _programs(text: str) -> Iterator[tuple[ast.Module, str]]:
    """From every line that may begin a program, as many lines as are one."""
    lines = text.split("\n")
    starts = [i for i, line in enumerate(lines) if BEGINS.match(line)]
    for start in starts:
        for end in range(len(lines), start, -1):
            source = "\n".join(lines[start:end])
            try:
                yield ast.parse(source), source
            except (SyntaxError, ValueError, RecursionError, MemoryError):
                continue
            break


def _last_defined(tree: ast.Module, names: Collection[str]) -> int | None:
    named = (isinstance(node, DEFINITIONS) and node.name in names for node in tree.body)
    places = (i for i, is_named in enumerate(named) if is_named)
    return max(places, default=None)


def _cut(tree: ast.Module, source: str, last: int) -> str:
    lines = source.split("\n")
    kept = [node for i, node in enumerate(tree.body) if i <= last or isinstance(node, KEPT)]
    parts = []
    for node in kept:
        if isinstance(node, ast.ImportFrom) and node.module == "__future__":
            continue  # must stand first, and changes nothing that a test sees
        above = [decorator.lineno for decorator in getattr(node, "decorator_list", ())]
        parts.append("\n".join(lines[min([node.lineno, *above]) - 1 : node.end_lineno]))
    return "\n".join(parts)
