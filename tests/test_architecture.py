"""A floor imports only lower floors."""

from __future__ import annotations

import ast
from pathlib import Path

import pytest

import droplora_jax

ROOT = Path(droplora_jax.__file__).parent

# A module, or a folder as a whole, and its floor. A new module is a new line.
FLOORS = {
    "arguments": 0,
    "attention": 0,
    "blockwise": 0,
    "buckets": 0,
    "collectives": 0,
    "compile_cache": 0,
    "cudnn": 0,
    "dealing": 0,
    "digests": 1,
    "display": 0,
    "embedding": 0,
    "errors": 0,
    "files": 0,
    "flops": 0,
    "hardware": 0,
    "linear": 0,
    "loss": 0,
    "lowrank": 0,
    "mask_keys": 0,
    "metrics": 0,
    "ops": 0,
    "partial": 0,
    "optim": 0,
    "portions": 0,
    "prng": 0,
    "profiling": 0,
    "processes": 0,
    "quantized": 0,
    "rope": 0,
    "sampling": 0,
    "schedules": 0,
    "shared": 0,
    "sharding": 0,
    "signals": 0,
    "spectrum": 0,
    "splash": 0,
    "tensors": 0,
    "tokamax_gpu": 0,
    "weights": 0,
    "adapters": 1,
    "memory": 1,
    "data": 1,
    "models": 1,
    "hub": 2,
    "linen": 2,
    "quantizing": 2,
    "surgery": 2,
    "checkpoint": 3,
    "decoding": 3,
    "export": 3,
    "foreign": 3,
    "generate": 3,
    "several": 3,
    "step": 3,
    "evaluate": 4,
    "validation": 4,
    "program": 4,
    "tokenizer": 1,
    "watch": 4,
    "train": 5,
    "run": 6,
    "chatting": 8,
    "compiling": 7,
    "evaluating": 8,
    "exporting": 8,
    "generating": 8,
    "inspection": 8,
    "launch": 7,
    "opening": 7,
    "reading": 7,
    "plan": 7,
    "planning": 8,
    "quickstart": 8,
    "cli": 9,
}

# Imports within a floor that are allowed: `errors` is what everything raises.
WITHIN = {
    ("attention", "blockwise"),
    ("attention", "cudnn"),
    ("attention", "dealing"),
    ("attention", "errors"),
    ("attention", "sharding"),
    ("attention", "splash"),
    ("attention", "tokamax_gpu"),
    ("blockwise", "ops"),
    ("blockwise", "portions"),
    ("dealing", "blockwise"),
    ("dealing", "portions"),
    ("dealing", "sharding"),
    ("flops", "cudnn"),
    ("flops", "splash"),
    ("flops", "tokamax_gpu"),
    ("buckets", "errors"),
    ("buckets", "files"),
    ("chatting", "generating"),
    ("compile_cache", "files"),
    ("checkpoint", "step"),
    ("hub", "quantizing"),
    ("hub", "surgery"),
    ("launch", "compiling"),
    ("launch", "reading"),
    ("embedding", "sharding"),
    ("files", "errors"),
    ("generate", "decoding"),
    ("hardware", "errors"),
    ("lowrank", "ops"),
    ("display", "metrics"),
    ("linear", "errors"),
    ("loss", "sharding"),
    ("mask_keys", "errors"),
    ("metrics", "files"),
    ("opening", "launch"),
    ("plan", "compiling"),
    ("optim", "errors"),
    ("optim", "schedules"),
    ("partial", "errors"),
    ("partial", "files"),
    ("partial", "metrics"),
    ("processes", "errors"),
    ("quantized", "errors"),
    ("schedules", "errors"),
    ("shared", "lowrank"),
    ("sharding", "errors"),
    ("tensors", "errors"),
    ("tokamax_gpu", "ops"),
    ("validation", "evaluate"),
    ("weights", "buckets"),
    ("weights", "errors"),
    ("weights", "files"),
    ("weights", "tensors"),
}

MODULES = sorted(path for path in ROOT.rglob("*.py") if path != ROOT / "__init__.py")


def part(path: Path) -> str:
    """The line of the table that a file belongs to."""
    return path.relative_to(ROOT).with_suffix("").parts[0]


def imported_parts(path: Path) -> set[str]:
    names: set[str] = set()
    for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
        if isinstance(node, ast.Import):
            names |= {alias.name for alias in node.names}
        elif isinstance(node, ast.ImportFrom):
            assert node.level == 0, f"{path}: write imports in full, from droplora_jax"
            names |= {f"{node.module}.{alias.name}" for alias in node.names}
    parts = {tuple(name.split(".")) for name in names}
    return {name[1] for name in parts if name[0] == "droplora_jax" and len(name) > 1}


@pytest.mark.parametrize("path", MODULES, ids=lambda path: str(path.relative_to(ROOT)))
def test_a_floor_imports_only_lower_floors(path):
    own = part(path)
    assert own in FLOORS, f"{own} has no floor: add it to FLOORS in {Path(__file__).name}"
    for other in imported_parts(path) - {own}:
        assert other in FLOORS, (
            f"{path.name} imports {other!r}: import from the module, not from droplora_jax itself; "
            f"or add it to FLOORS in {Path(__file__).name}"
        )
        assert FLOORS[other] < FLOORS[own] or (own, other) in WITHIN, (
            f"{own} (floor {FLOORS[own]}) imports {other} (floor {FLOORS[other]})"
        )


def test_imports_are_found_wherever_they_stand(tmp_path):
    assert part(ROOT / "models" / "llama.py") == "models"
    file = tmp_path / "x.py"
    file.write_text("import droplora_jax.train\nfrom droplora_jax import ops\n")
    file.write_text(file.read_text() + "def f():\n    from droplora_jax.data.rows import x\n")
    assert imported_parts(file) == {"train", "ops", "data"}


def test_importing_a_module_calls_nothing_for_its_effect():
    """No module reads the environment or changes jax's settings when it is imported."""
    for path in MODULES:
        for node in ast.parse(path.read_text(encoding="utf-8")).body:
            if isinstance(node, ast.Expr) and isinstance(node.value, ast.Call):
                # `f.defvjp(...)` is how jax completes the definition of a function above it.
                called = ast.unparse(node.value.func)
                assert called.endswith(".defvjp"), f"{path}:{node.lineno}: {called} at import"
