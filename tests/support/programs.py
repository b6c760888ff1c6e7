"""A budget for what a test file costs: the distinct programs that it has XLA compile.

`tests/budget.json` has a line for each file: the programs that it may compile, the Python processes
that it may start, and the seconds that it took when the line was written. A file without a line may
have those of `Budget`. A session in which a file exceeds its budget fails. Long files are run
first, so that two workers end together. `pytest --write-budget` writes the lines of the files that
it runs, with a tenth to spare.

Two programs are the same if they have the same key in JAX's compilation cache, whether they were
found there or compiled. Tests that are marked as slow are not counted, nor are the programs of
other processes.
"""

from __future__ import annotations

import json
import math
import subprocess
import sys
import time
from collections import defaultdict
from collections.abc import Iterator
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

import pytest
from jax._src import compilation_cache

FILE = "tests/budget.json"
WORDS = {"programs": "compiled {} distinct programs", "starts": "started Python {} times"}


@dataclass(frozen=True)
class Budget:
    programs: int = 10
    starts: int = 2
    seconds: float = math.inf


@dataclass
class Cost:
    keys: set[str] = field(default_factory=set)
    starts: int = 0
    seconds: float = 0.0

    def counts(self) -> dict[str, float]:
        """In plain values, which a worker can send."""
        return {"programs": len(self.keys), "starts": self.starts, "seconds": self.seconds}


def read_budgets(file: Path) -> dict[str, Budget]:
    lines = json.loads(file.read_text(encoding="utf-8")) if file.exists() else {}
    return {name: Budget(**values) for name, values in lines.items()}


def write_budgets(file: Path, budgets: dict[str, Budget]) -> None:
    lines = [f"{json.dumps(n)}: {json.dumps(asdict(budgets[n]))}" for n in sorted(budgets)]
    file.write_text("{\n  " + ",\n  ".join(lines) + "\n}\n", encoding="utf-8")


def budget_for(counts: dict[str, float]) -> Budget:
    """A tenth more programs than were counted, rounded up to a multiple of ten."""
    programs = max(Budget.programs, 10 * math.ceil(1.1 * counts["programs"] / 10))
    starts = max(Budget.starts, int(counts["starts"]))
    return Budget(programs, starts, round(counts["seconds"], 1))


def exceeded(name: str, counts: dict[str, float], budget: Budget) -> list[str]:
    """A sentence for each count of a file that is above its budget."""
    return [
        f"{name} {words.format(counts[key])}, more than the {getattr(budget, key)} of its budget: "
        f"let its tests share shapes and jitted functions, or raise {key!r} in {FILE} "
        f"(pytest --write-budget {name})"
        for key, words in WORDS.items()
        if counts[key] > getattr(budget, key)
    ]


def file_of(item: pytest.Item) -> str:
    return item.nodeid.split("::")[0]


class Programs:
    """Counts where tests run; compares and writes in the process that the user started."""

    def __init__(self, config: pytest.Config) -> None:
        self.config, self.file = config, config.rootpath / FILE
        self.costs: defaultdict[str, Cost] = defaultdict(Cost)
        self.results: dict[str, dict[str, float]] = {}
        self.problems: list[str] = []
        self.current = Cost()
        self.patch = pytest.MonkeyPatch()

    def pytest_sessionstart(self) -> None:
        key_of, popen = compilation_cache.get_cache_key, subprocess.Popen.__init__

        def get_cache_key(*arguments: Any, **options: Any) -> str:
            key = key_of(*arguments, **options)
            self.current.keys.add(key)
            return key

        def start(process: Any, arguments: Any, *rest: Any, **options: Any) -> None:
            self.current.starts += not isinstance(arguments, str) and sys.executable in arguments
            popen(process, arguments, *rest, **options)

        self.patch.setattr(compilation_cache, "get_cache_key", get_cache_key)
        self.patch.setattr(subprocess.Popen, "__init__", start)

    def pytest_unconfigure(self) -> None:
        self.patch.undo()

    @pytest.hookimpl(trylast=True)
    def pytest_collection_modifyitems(self, items: list[pytest.Item]) -> None:
        budgets = read_budgets(self.file)
        items.sort(key=lambda item: -budgets.get(file_of(item), Budget()).seconds)

    @pytest.hookimpl(wrapper=True)
    def pytest_runtest_protocol(self, item: pytest.Item) -> Iterator[None]:
        slow = item.get_closest_marker("slow") is not None
        self.current, start = Cost() if slow else self.costs[file_of(item)], time.perf_counter()
        result = yield
        self.current.seconds += time.perf_counter() - start
        return result

    @pytest.hookimpl(optionalhook=True)
    def pytest_testnodedown(self, node: Any) -> None:
        self.results |= getattr(node, "workeroutput", {}).get("costs", {})

    def pytest_sessionfinish(self, session: pytest.Session) -> None:
        self.results |= {name: cost.counts() for name, cost in self.costs.items()}
        budgets = read_budgets(self.file)
        if hasattr(self.config, "workeroutput"):
            self.config.workeroutput["costs"] = self.results
        elif not self.config.option.write_budget:
            for name, counts in sorted(self.results.items()):
                self.problems += exceeded(name, counts, budgets.get(name, Budget()))
            if self.problems and session.exitstatus == pytest.ExitCode.OK:
                session.exitstatus = pytest.ExitCode.TESTS_FAILED
        elif session.testsfailed:
            self.problems.append("No budget is written: tests failed")
        else:
            present = {n: b for n, b in budgets.items() if (self.config.rootpath / n).exists()}
            new = {name: budget_for(counts) for name, counts in self.results.items()}
            write_budgets(self.file, present | new)

    def pytest_terminal_summary(self, terminalreporter: Any) -> None:
        if self.problems:
            terminalreporter.section("budget of compiled programs", red=True)
            for problem in self.problems:
                terminalreporter.line(problem)


def pytest_addoption(parser: pytest.Parser) -> None:
    words = f"write what the test files that are run cost to {FILE} (whole files, cold cache)"
    parser.addoption("--write-budget", action="store_true", help=words)


def pytest_configure(config: pytest.Config) -> None:
    option = config.option
    if option.write_budget and (option.keyword or any("::" in name for name in config.args)):
        raise pytest.UsageError("--write-budget is for whole files: leave out -k and ids of tests")
    option.loadscopereorder = False  # xdist keeps the order, which is by seconds
    config.pluginmanager.register(Programs(config))
