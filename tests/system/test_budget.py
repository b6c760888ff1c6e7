"""Test files that exceed their budget of compiled programs fail the session."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

SUPPORT = Path(__file__).parents[1] / "support"

# The same program twice, and three others: shapes are part of a program.
COMPILES = """
import jax, jax.numpy as jnp, pytest
@pytest.mark.parametrize("size", [1, 1, {sizes}])
def test_it(size):
    jax.jit(lambda x: x + 1).lower(jax.ShapeDtypeStruct((size,), jnp.float32)).compile()
@pytest.mark.slow
def test_slow():
    for size in range(50, 60):
        test_it(size)
"""
STARTS = """
import subprocess, sys
def test_it():
    for _ in range(3):
        subprocess.run([sys.executable, "-S", "-c", ""])
"""


def line(programs: int, starts: int = 2, seconds: float = 1.0) -> dict[str, float]:
    return {"programs": programs, "starts": starts, "seconds": seconds}


@pytest.fixture
def run(pytester):
    """Sessions over three files, after their budget is written."""

    def run(*arguments: str, sizes: str = "2, 3, 4", **budget: dict[str, float]):
        files = {f"tests/test_{name}.py": line for name, line in budget.items()}
        (tests := pytester.path / "tests").mkdir(exist_ok=True)
        (tests / "test_many.py").write_text(COMPILES.format(sizes=sizes))
        (tests / "test_one.py").write_text(COMPILES.format(sizes="1"))
        (tests / "test_starts.py").write_text(STARTS)
        (tests / "budget.json").write_text(json.dumps(files))
        pytester.makepyprojecttoml("[tool.pytest.ini_options]\nmarkers = ['slow']\n")
        result = pytester.runpytest_inprocess("-p", "programs", "-m", "not slow", *arguments)
        written = json.loads((tests / "budget.json").read_text())
        return result.ret, "\n".join(result.outlines + result.errlines), written

    return run


@pytest.mark.parametrize("workers", [("-p", "no:xdist"), ("-n", "2", "--dist", "loadfile")])
def test_a_file_above_its_budget_fails_the_session(run, workers, monkeypatch):
    """The same with workers, and from a warm cache; a long file runs first."""
    monkeypatch.setenv("PYTHONPATH", str(SUPPORT))  # of the workers
    for _ in range(1 if "-n" in workers else 2):
        code, out, _ = run(*workers, "-v", many=line(3), one=line(1, seconds=9.0))
        assert code == pytest.ExitCode.TESTS_FAILED, out
        assert "9 passed" in out
        assert "tests/test_many.py compiled 4 distinct programs, and its budget is 3: let" in out
        assert "tests/test_starts.py started Python 3 times, and its budget is 2: let" in out
        assert "raise 'programs' in tests/budget.json (pytest --write-budget tests/test_m" in out
        assert "tests/test_one.py compiled" not in out
    if "-n" not in workers:
        order = [out.index(f"test_{name}.py::") for name in ("starts", "one", "many")]
        assert order == sorted(order)


def test_the_budget_is_written_with_a_tenth_to_spare(run):
    sizes = "*range(1, 11)"
    code, out, budget = run("--write-budget", sizes=sizes, gone=line(3), one=line(30))
    assert code == 0, out
    assert {name: (line["programs"], line["starts"]) for name, line in budget.items()} == {
        "tests/test_many.py": (20, 2),
        "tests/test_one.py": (10, 2),
        "tests/test_starts.py": (10, 3),
    }


def test_the_budget_is_written_for_whole_files_that_pass(run):
    before = {"one": line(30)}
    code, out, budget = run("--write-budget", "-k", "many", **before)
    assert (code, "leave out -k" in out) == (pytest.ExitCode.USAGE_ERROR, True)
    assert budget == {"tests/test_one.py": line(30)}
    code, out, budget = run("--write-budget", sizes="'no size'", **before)
    assert (code, "no line is written, because tests of it failed" in out) == (1, True)
    assert budget.keys() == {"tests/test_one.py", "tests/test_starts.py"}
