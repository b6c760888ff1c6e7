"""Sides of a comparison, each in a process of its own that sleeps until it is told to run.

So no two ever share the cores, what one has allocated is not counted for another, and each may
have its own Python. Only the standard library is needed here.
"""

from __future__ import annotations

import multiprocessing
import os
import platform
import subprocess
import sys
import time
from collections.abc import Sequence
from dataclasses import dataclass, field, replace
from importlib.metadata import PackageNotFoundError, version
from multiprocessing.connection import Connection
from pathlib import Path
from typing import Any, Protocol


class Unavailable(Exception):
    """A side needs what is not here: a package, a device. Says what, and how to get it."""


class Failed(Exception):
    """A side could not do its work.

    Attributes:
      kind: `unavailable`, `memory` (it does not fit), `time`, or `error`.
    """

    def __init__(self, kind: str, text: str) -> None:
        super().__init__(kind, text)
        self.kind, self.text = kind, text

    def __str__(self) -> str:
        return self.text


class Side(Protocol):
    packages: tuple[str, ...]  # whose versions matter

    def prepare(self, work: Any) -> Any:
        """Make an object with functions to call, in the side's own process."""


@dataclass(frozen=True)
class Result:
    """One call.

    Attributes:
      wall, cpu: seconds on the clock, and of the cores.
      value: what came out.
      resident: the most bytes that the process had in memory during the call.
      device: the most bytes of an accelerator that it has ever used; None without one.
    """

    wall: float
    cpu: float
    value: Any
    resident: int
    device: int | None


@dataclass(frozen=True)
class Ready:
    """A side before its first call.

    Attributes:
      seconds: from the start of its process.
      versions: of the packages that matter.
      resident: bytes in memory.
    """

    seconds: float
    versions: dict[str, str]
    resident: int


@dataclass(frozen=True)
class Place:
    """Where a side runs: its cores, and its Python with environment variables."""

    cores: tuple[int, ...]
    python: str = sys.executable
    environment: dict[str, str] = field(default_factory=dict)


class Worker:
    """A side in its own process, prepared; `ready` says what it took."""

    def __init__(self, side: Side, work: Any, place: Place, deadline: float | None = None) -> None:
        """
        Args:
          deadline: on `time.monotonic`'s clock; whatever is not done by then has failed.

        Raises:
          Failed: it can't be prepared.
        """
        self._deadline = deadline
        begin = time.perf_counter()
        self._pipe, theirs = multiprocessing.Pipe()
        here = str(Path(__file__).resolve().parent)
        code = f"import sys; sys.path.insert(0, {here!r}); import workers; workers.serve()"
        self._process = subprocess.Popen(
            [place.python, "-c", code, str(theirs.fileno())],
            pass_fds=[theirs.fileno()],
            env={**os.environ, **place.environment},
        )
        theirs.close()
        self._pipe.send((side, work, place.cores))
        self.ready: Ready = replace(self._answer(), seconds=time.perf_counter() - begin)

    def call(self, name: str, times: int = 1) -> list[Result]:
        """Call a function of what was prepared so many times.

        Raises:
          Failed: it raised an exception, or the process ended.
        """
        self._pipe.send((name, times))
        return self._answer()

    def stop(self) -> None:
        """End the process; a second time does nothing."""
        self._pipe.close()
        self._process.wait()

    def _answer(self) -> Any:
        left = None if self._deadline is None else max(self._deadline - time.monotonic(), 0)
        try:
            answer = self._pipe.recv() if self._pipe.poll(left) else Failed("time", "out of time")
        except (EOFError, ConnectionResetError):
            code = self._process.wait()
            kind = "memory" if code == -9 else "error"  # SIGKILL: the kernel had no memory left
            answer = Failed(kind, f"its process ended with {code}")
        if isinstance(answer, Failed):
            self._process.kill()
            self.stop()
            raise answer
        return answer


def serve() -> None:
    """In the worker's process: prepare, then call what the pipe names."""
    pipe = Connection(int(sys.argv[1]))
    try:
        side, work, cores = pipe.recv()
        # Before torch or JAX starts its threads: both make one for every core that they may use.
        os.sched_setaffinity(0, cores)
        prepared = side.prepare(work)
        found = {name: version(name) for name in side.packages}
        pipe.send(Ready(0.0, found, memory()["now"]))
        while True:
            name, times = pipe.recv()
            pipe.send([_timed(prepared, name) for _ in range(times)])
    except EOFError:
        return
    except Exception as error:
        failure = _failure(error)
        if failure.kind == "error":
            sys.excepthook(*sys.exc_info())
        pipe.send(failure)


def _timed(prepared: Any, name: str) -> Result:
    call = getattr(prepared, name)
    Path("/proc/self/clear_refs").write_text("5")  # forget the peak so far
    wall, cpu = time.perf_counter(), time.process_time()
    value = call()
    wall, cpu = time.perf_counter() - wall, time.process_time() - cpu
    device_peak = getattr(prepared, "device_peak", None)
    device = device_peak() if device_peak is not None else None
    return Result(wall, cpu, value, memory()["peak"], device)


def _failure(error: Exception) -> Failed:
    text = str(error).strip().splitlines()[0][:200] if str(error).strip() else repr(error)
    if isinstance(error, ImportError | PackageNotFoundError):
        return Failed("unavailable", f"not installed ({text})")
    if isinstance(error, Unavailable):
        return Failed("unavailable", text)
    out_of_memory = type(error).__name__ == "OutOfMemoryError" or "RESOURCE_EXHAUSTED" in str(error)
    if out_of_memory or isinstance(error, MemoryError):
        return Failed("memory", "does not fit into memory")
    return Failed("error", f"{type(error).__name__}: {text}")


def memory() -> dict[str, int]:
    """Resident bytes of this process, now and at its peak."""
    lines = Path("/proc/self/status").read_text().splitlines()
    kilobytes = {line.split(":")[0]: line.split()[1] for line in lines if line.startswith("Vm")}
    return {"now": int(kilobytes["VmRSS"]) * 1024, "peak": int(kilobytes["VmHWM"]) * 1024}


def chosen_cores(count: int) -> tuple[int, ...]:
    """The first so many of the cores that this process may use; all of them if 0."""
    cores = sorted(os.sched_getaffinity(0))
    return tuple(cores[:count] if count else cores)


def cpu_model() -> str:
    for line in Path("/proc/cpuinfo").read_text().splitlines():
        if line.startswith("model name"):
            return line.split(":", 1)[1].strip()
    return platform.processor() or platform.machine()


def versions(packages: Sequence[str]) -> str:
    """Python's version and the packages', on one line."""
    return ", ".join(
        [f"Python {platform.python_version()}", *(f"{p} {version(p)}" for p in packages)]
    )
