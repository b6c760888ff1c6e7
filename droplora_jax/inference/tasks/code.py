"""The part of a completion that is the asked-for program, and the prompt that asks for one."""

from __future__ import annotations

import ast
import re
from collections.abc import Collection, Iterator, Sequence
from textwrap import dedent, indent

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

    It may stand in a fenced block or between prose, indented as a whole or but for its first line.
    Behind the last of the functions only further definitions are kept: no examples of use, and no
    tests of the model's own.
    """
    texts = (*_blocks(completion), completion)
    indented = [way(text) for text in texts for way in (str, str.lstrip, dedent)]
    for text in dict.fromkeys(indented):
        for tree, source in _programs(text):
            last = _last_defined(tree, names)
            if last is not None:
                return _cut(tree, source, last)
    return None


def body(completion: str, head: str) -> str | None:
    """The rest of the function that `head` begins; None where there is none.

    It ends before the next line that is not indented. Where that is no Python, the indentation is
    taken to have slipped, and as much as possible is put at the function's depth.
    """
    text = _spaces(next(iter(_blocks(completion)), completion)).lstrip("\n")
    rest = _while_indented(text)
    if rest.strip() and _is_python(head + rest):
        return rest
    mended = max(_mended(text, head, _depth(head)), key=_line_count)
    return mended if mended.strip() else rest if rest.strip() else None


def _blocks(completion: str) -> list[str]:
    """What stands in fences."""
    return [match.group(1) for match in FENCED.finditer(completion)]


def _spaces(text: str) -> str:
    """The text indented with spaces instead of tabs."""
    return re.sub(r"^[ \t]+", lambda tabs: tabs.group().expandtabs(4), text, flags=re.MULTILINE)


def _while_indented(text: str) -> str:
    end = re.search(r"^\S", text, flags=re.MULTILINE)
    return text[: end.start()] if end else text


def _mended(text: str, head: str, depth: int) -> Iterator[str]:
    """The rest of a function whose indentation slipped, in one way after the other."""
    first, _, others = text.partition("\n")
    first, others = " " * depth + first.strip(), _while_indented(others)
    flush = dedent(others)
    # The first line alone, the first line and the others in different ways, all in the same way.
    for rest in (
        f"{first}\n{others}",
        f"{first}\n{indent(flush, ' ' * depth)}",
        f"{first}\n{indent(flush, ' ' * (depth + 4))}",
        indent(dedent(text), " " * depth),
    ):
        yield _longest_python(head, rest.split("\n"))


def _longest_python(head: str, lines: Sequence[str]) -> str:
    """As many of the lines as are Python behind `head`."""
    ends = range(len(lines), 0, -1)
    texts = ("\n".join(lines[:end]) for end in ends)
    return next((text for text in texts if _is_python(head + text)), "")


def _line_count(text: str) -> int:
    return sum(bool(line.strip()) for line in text.split("\n"))


def _depth(head: str) -> int:
    """How far the body of the last function in `head` is indented."""
    tree = _parsed(head)
    if tree is None:  # nothing of the body is there yet
        last = head.rstrip().rpartition("\n")[2]
        return len(last) - len(last.lstrip()) + 4
    functions = [node for node in ast.walk(tree) if isinstance(node, DEFINITIONS)]
    return max(functions, key=lambda node: node.lineno).body[0].col_offset


def _is_python(source: str) -> bool:
    return _parsed(source) is not None


def _parsed(source: str) -> ast.Module | None:
    try:
        return ast.parse(source)
    except (SyntaxError, ValueError, RecursionError, MemoryError):
        return None


def _programs(text: str) -> Iterator[tuple[ast.Module, str]]:
    """From every line that may begin a program, as many lines as are one."""
    lines = text.split("\n")
    starts = [i for i, line in enumerate(lines) if BEGINS.match(line)]
    for start in starts:
        for end in range(len(lines), start, -1):
            source = "\n".join(lines[start:end])
            tree = _parsed(source)
            if tree is not None:
                yield tree, source
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
