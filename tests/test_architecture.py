"""A room imports only the rooms below it, and no module imports itself by way of others.

Run as a program, this file prints the picture: rooms, arrows and circles.
"""

from __future__ import annotations

import ast
import sys
from collections.abc import Iterator, Mapping
from graphlib import CycleError, TopologicalSorter
from pathlib import Path

PACKAGE = "droplora_jax"
ROOT = Path(__file__).parents[1] / PACKAGE

# From the ground up: a room imports only those before it. A new room is a new word here.
ROOMS = [
    "core",
    "data",
    "lowrank",
    "nn",
    "models",
    "adapters",
    "hf",
    "inference",
    "training",
    "runs",
    "commands",
    "cli",
]
APART = {("adapters", "models")}  # side by side: neither imports the other

Imports = Mapping[str, set[str]]


def imports(root: Path = ROOT) -> Imports:
    """The modules of the package that each of its modules imports, wherever in it they stand."""
    files = {_module(file, root): file for file in sorted(root.rglob("*.py"))}
    return {name: set(_imported(file, files)) - {name} for name, file in files.items()}


def _module(file: Path, root: Path) -> str:
    parts = file.relative_to(root.parent).with_suffix("").parts
    return ".".join(parts[:-1] if parts[-1] == "__init__" else parts)


def _imported(file: Path, known: Mapping[str, Path]) -> Iterator[str]:
    for node in ast.walk(ast.parse(file.read_text(encoding="utf-8"))):
        if isinstance(node, ast.Import):
            names = [alias.name for alias in node.names]
        elif isinstance(node, ast.ImportFrom):
            assert node.level == 0, f"{file}:{node.lineno}: write imports in full"
            names = [f"{node.module}.{alias.name}" for alias in node.names]
        else:
            continue
        for name in names:
            if name.split(".")[0] == PACKAGE:
                yield name if name in known else name.rpartition(".")[0]


def room(module: str) -> str | None:
    """The room of a module; None for the package's own `__init__`."""
    parts = module.split(".")
    return parts[1] if len(parts) > 1 else None


def room_arrows(graph: Imports) -> dict[tuple[str, str], int]:
    """How many imports lead from one room to another."""
    arrows: dict[tuple[str, str], int] = {}
    for module, imported in graph.items():
        for other in imported:
            pair = room(module), room(other)
            if pair[0] and pair[1] and pair[0] != pair[1]:
                arrows[pair] = arrows.get(pair, 0) + 1
    return arrows


def circle(graph: Imports) -> list[str]:
    """Modules that import each other in a circle; empty if there is none."""
    try:
        TopologicalSorter(graph).prepare()
    except CycleError as error:
        return list(error.args[1])
    return []


def test_rooms_stand_on_each_other_without_a_circle():
    graph = imports()
    inside = {module: room(module) for module in graph}
    assert set(inside.values()) == {*ROOMS, None}, "a room without a place in ROOMS, or none left"
    for (above, below), count in room_arrows(graph).items():
        assert ROOMS.index(below) < ROOMS.index(above), f"{above} imports {below} ({count} times)"
        assert tuple(sorted((above, below))) not in APART, f"{above} imports {below}"
    for module, imported in graph.items():
        assert PACKAGE not in imported, f"{module}: import from the module, not from {PACKAGE}"
    assert not circle(graph), " -> ".join(circle(graph))
    assert circle({"a": {"b"}, "b": {"c"}, "c": {"a"}})


def test_importing_a_module_calls_nothing_for_its_effect():
    """No module reads the environment or changes JAX's settings when it is imported."""
    for file in sorted(ROOT.rglob("*.py")):
        for node in ast.parse(file.read_text(encoding="utf-8")).body:
            if isinstance(node, ast.Expr) and isinstance(node.value, ast.Call):
                # `f.defvjp(...)` is how JAX completes the definition of a function above it.
                called = ast.unparse(node.value.func)
                assert called.endswith(".defvjp"), f"{file}:{node.lineno}: {called} at import"


def picture(graph: Imports) -> str:
    """Rooms from the ground up, with their modules and the rooms that each imports."""
    arrows = room_arrows(graph)
    names = sorted({name for name in map(room, graph) if name}, key=_floor)
    lines = [
        f"{len(graph)} modules in {len(names)} rooms, {len(arrows)} arrows between rooms, "
        f"{sum(arrows.values())} imports behind them; circle: {circle(graph) or 'none'}"
    ]
    for name in names:
        count = sum(room(module) == name for module in graph)
        below = sorted((b for a, b in arrows if a == name), key=_floor)
        lines.append(f"{name:12} {count:3} modules -> {', '.join(below) or 'nothing'}")
    return "\n".join(lines)


def _floor(name: str) -> int:
    return ROOMS.index(name) if name in ROOMS else len(ROOMS)


if __name__ == "__main__":
    print(picture(imports(Path(sys.argv[1]) if len(sys.argv) > 1 else ROOT)))
