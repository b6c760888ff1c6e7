"""Sides of a comparison that take turns, each in a process of its own.

A process sleeps until it is told to run, so that no two ever share the cores.
"""

from __future__ import annotations

import multiprocessing
import os
import platform
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from importlib.metadata import version
from multiprocessing.connection import Connection
from pathlib import Path
from typing import Any


@dataclass(frozen=True)
class Result:
    """One turn: seconds on the clock, seconds of the cores, and what came out."""

    wall: float
    cpu: float
    value: Any


class Worker:
    """A side in its own process, on these cores: `prepare(work)` makes what is run."""

    def __init__(self, prepare: Callable, work: Any, cores: Sequence[int]) -> None:
        context = multiprocessing.get_context("spawn")
        self._pipe, theirs = context.Pipe()
        arguments = (prepare, work, tuple(cores), theirs)
        self._process = context.Process(target=_serve, args=arguments, daemon=True)
        self._process.start()

    def run(self, times: int = 1) -> list[Result]:
        """Run so many times."""
        self._pipe.send(times)
        return self._pipe.recv()

    def stop(self) -> None:
        self._pipe.send(0)
        self._process.join()


def _serve(prepare: Callable, work: Any, cores: tuple[int, ...], pipe: Connection) -> None:
    # Before torch or JAX starts its threads: both make one for every core that they may use.
    os.sched_setaffinity(0, cores)
    run = prepare(work)
    while times := pipe.recv():
        results = []
        for _ in range(times):
            wall, cpu = time.perf_counter(), time.process_time()
            value = run()
            wall, cpu = time.perf_counter() - wall, time.process_time() - cpu
            results.append(Result(wall, cpu, value))
        pipe.send(results)


def versions(packages: Sequence[str]) -> str:
    """Python's version and the packages', on one line."""
    return ", ".join(
        [f"Python {platform.python_version()}", *(f"{p} {version(p)}" for p in packages)]
    )


def cpu_model() -> str:
    for line in Path("/proc/cpuinfo").read_text().splitlines():
        if line.startswith("model name"):
            return line.split(":", 1)[1].strip()
    return platform.processor() or platform.machine()
