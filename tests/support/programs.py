"""A budget for what a test file costs: the distinct programs that it has XLA compile.

tests/budget.json has a line for each file: the programs that it may compile, the Python processes
that it may start, and the CPU seconds that it took when the line was written, by which long files
are run first, so that two workers end together. A session in which a file exceeds its budget fails.
`pytest --write-budget` writes the lines of the files that it runs and whose tests pass.

Two programs are the same if they have the same key in JAX's compilation cache, whether they are
found there or compiled. Tests that are marked as slow are not counted, nor are the programs of
other processes.
"""

from __future__ import annotations

import json
import math
import os
import subprocess
import sys
from collections import Counter, defaultdict
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from jax._src import compilation_cache

FILE = "tests/budget.json"
DEFAULT = {"programs": 10, "starts": 2, "seconds": math.inf}  # a file without a line may be long
WORDS = {"programs": "compiled {} distinct programs", "starts": "started Python {} times"}

Line = dict[str, float]


def read_budget(file: Path) -> dict[str, Line]:
    return json.loads(file.read_text(encoding="utf-8")) if file.exists() else {}


def write_budget(file: Path, counts: dict[str, Line]) -> None:
    """Replaces the lines of the files that were counted: a tenth more programs, in whole tens."""
    root = file.parents[1]
    lines = {name: line for name, line in read_budget(file).items() if (root / name).exists()}
    for name, count in counts.items():
        programs = 10 * max(1, math.ceil(1.1 * count["programs"] / 10))
        starts = max(DEFAULT["starts"], count["starts"])
        lines[name] = {"programs": programs, "starts": starts, "seconds": round(count["seconds"])}
    text = ",\n  ".join(f"{json.dumps(name)}: {json.dumps(lines[name])}" for name in sorted(lines))
    file.write_text("{\n  " + text + "\n}\n", encoding="utf-8")


def exceeded(name: str, count: Line, budget: Line) -> list[str]:
    """A sentence for each count of a file that is above its budget."""
    return [
        f"{name} {words.format(count[key])}, and its budget is {budget[key]}: let its tests share "
        f"shapes and jitted functions, or raise {key!r} in {FILE} (pytest --write-budget {name})"
        for key, words in WORDS.items()
        if count[key] > budget[key]
    ]


def file_of(item: pytest.Item) -> str:
    return item.nodeid.split("::")[0]


class Programs:
    """Counts where tests run; compares and writes in the process that the user started."""

    def __init__(self, config: pytest.Config) -> None:
        self.config, self.file = config, config.rootpath / FILE
        self.keys: defaultdict[str, set[str]] = defaultdict(set)
        self.starts: Counter[str] = Counter()
        self.seconds: defaultdict[str, float] = defaultdict(float)
        self.counts: dict[str, Line] = {}
        self.problems: list[str] = []
        self.failed: set[str] = set()  # files
        self.current = ""  # the file of the test that runs, or nothing if the test is slow
        self.patch = pytest.MonkeyPatch()

    def pytest_sessionstart(self) -> None:
        key_of, popen = compilation_cache.get_cache_key, subprocess.Popen.__init__

        def get_cache_key(*arguments: Any, **options: Any) -> str:
            key = key_of(*arguments, **options)
            self.keys[self.current].add(key)
            return key

        def start(process: Any, args: Any, *rest: Any, **options: Any) -> None:
            self.starts[self.current] += not isinstance(args, str) and sys.executable in args
            popen(process, args, *rest, **options)

        self.patch.setattr(compilation_cache, "get_cache_key", get_cache_key)
        self.patch.setattr(subprocess.Popen, "__init__", start)

    def pytest_unconfigure(self) -> None:
        self.patch.undo()

    @pytest.hookimpl(trylast=True)
    def pytest_collection_modifyitems(self, items: list[pytest.Item]) -> None:
        budget = read_budget(self.file)
        items.sort(key=lambda item: -budget.get(file_of(item), DEFAULT)["seconds"])

    @pytest.hookimpl(wrapper=True)
    def pytest_runtest_protocol(self, item: pytest.Item) -> Iterator[None]:
        self.current = "" if item.get_closest_marker("slow") else file_of(item)
        before = sum(os.times()[:4])  # of this process and of those that it has waited for
        result = yield
        self.seconds[self.current] += sum(os.times()[:4]) - before
        return result

    def pytest_runtest_logreport(self, report: pytest.TestReport) -> None:
        if report.failed:
            self.failed.add(report.nodeid.split("::")[0])

    @pytest.hookimpl(optionalhook=True)
    def pytest_testnodedown(self, node: Any) -> None:
        self.counts |= getattr(node, "workeroutput", {}).get("counts", {})

    def pytest_sessionfinish(self, session: pytest.Session) -> None:
        for name in self.seconds.keys() - {""}:
            numbers = len(self.keys[name]), self.starts[name], self.seconds[name]
            self.counts[name] = dict(zip(DEFAULT, numbers, strict=True))
        if hasattr(self.config, "workeroutput"):  # in a worker of xdist
            self.config.workeroutput["counts"] = self.counts
        elif not self.config.option.write_budget:
            budget = read_budget(self.file)
            for name, count in sorted(self.counts.items()):
                self.problems += exceeded(name, count, budget.get(name, DEFAULT))
            if self.problems and session.exitstatus == pytest.ExitCode.OK:
                session.exitstatus = pytest.ExitCode.TESTS_FAILED
        else:
            for name in sorted(self.failed & self.counts.keys()):
                self.problems.append(f"{name}: no line is written, because tests of it failed")
                del self.counts[name]
            write_budget(self.file, self.counts)

    def pytest_terminal_summary(self, terminalreporter: Any) -> None:
        if self.problems:
            terminalreporter.section("budget of compiled programs", red=True)
            terminalreporter.write_line("\n".join(self.problems))


def pytest_addoption(parser: pytest.Parser) -> None:
    words = f"write what the test files that are run cost to {FILE} (from a cold cache)"
    parser.addoption("--write-budget", action="store_true", help=words)


def pytest_configure(config: pytest.Config) -> None:
    option = config.option
    if option.write_budget and (option.keyword or any("::" in name for name in config.args)):
        raise pytest.UsageError("--write-budget is for whole files: leave out -k and ids of tests")
    option.loadscopereorder = False  # xdist keeps the order of the files
    config.pluginmanager.register(Programs(config))
