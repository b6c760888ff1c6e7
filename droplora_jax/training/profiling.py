"""A trace of some steps of a run, for Perfetto and TensorBoard, with the step's parts by name."""

from __future__ import annotations

import gzip
import json
import re
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from types import MappingProxyType
from typing import Protocol, runtime_checkable

import jax

# The names given with `jax.named_scope`, in the models, `lowrank`, `loss` and `step`. `layers` is
# what joins the layers: the scan, and keeping and reading what the backward pass needs.
PARTS = (
    "embedding",
    "layers",
    "norm",
    "attention",
    "feed_forward",
    "low_rank",
    "mask",
    "loss",
    "optimizer",
)

# Options of the compiler, by platform, for a step that will be traced. A GPU runs a command buffer
# as one event, so a trace could not tell its kernels apart.
COMPILER_OPTIONS: Mapping[str, Mapping[str, str]] = MappingProxyType(
    {"gpu": MappingProxyType({"xla_gpu_enable_command_buffer": ""})}
)

_PART = re.compile(rf"\b({'|'.join(PARTS)})\b")
_INSTRUCTION = re.compile(r'^\s*(?:ROOT )?%?([\w.-]+) = .*metadata=\{.*?op_name="([^"]*)"', re.M)
_HOLDS_OTHERS = re.compile(r"while|call|conditional")  # their time is that of what they hold


@runtime_checkable
class Executable(Protocol):
    """A compiled program."""

    def as_text(self) -> str | None:
        """Its HLO, with the named scopes in the metadata of each instruction."""
        ...


class Profile:
    """Traces the steps from `first` to `last` into a folder, in one process of the run.

    Each step runs inside `step`. `close`, after `last` or when the run ends before it, writes what
    was traced.
    """

    def __init__(
        self,
        folder: Path,
        first: int,
        last: int,
        executable: Executable,
        say: Callable[[str], None],
    ) -> None:
        """
        Args:
          first, last: the numbers of the steps; 0 and 0 for none.
          executable: the compiled step, whose `as_text()` tells the part of each instruction.
          say: shows a person the parts' shares of the time, and where the trace is.
        """
        self.folder, self.first, self.last = folder, first, last
        self.executable, self.say = executable, say
        self._tracing = False

    @contextmanager
    def step(self, number: int, state: object) -> Iterator[None]:
        """Marks the step of this number in the trace, which begins before `first`.

        Args:
          state: what the steps before it have computed; the trace begins when that is done.
        """
        if not self.first <= number <= self.last:
            yield
            return
        if not self._tracing:
            jax.block_until_ready(state)
            options = jax.profiler.ProfileOptions()
            options.python_tracer_level = 0  # tracing Python calls takes longer than the step
            jax.profiler.start_trace(self.folder, profiler_options=options)
            self._tracing = True
        with jax.profiler.StepTraceAnnotation("train", step_num=number):
            yield

    def close(self, last_metrics: object = None) -> None:
        """Write what was traced, if anything is being traced.

        Args:
          last_metrics: of the last traced step, which may still be running.
        """
        if not self._tracing:
            return
        self._tracing = False
        jax.block_until_ready(last_metrics)
        jax.profiler.stop_trace()
        traces = self.folder.glob("plugins/profile/*/*.trace.json.gz")
        trace = max(traces, key=lambda file: file.stat().st_mtime)
        named = trace.with_name("perfetto_trace.json.gz")
        times = write_named(trace, named, parts_of(self.executable.as_text() or ""))
        shares = sorted(times.items(), key=lambda item: -item[1])
        total = sum(times.values()) or 1.0
        summary = ", ".join(f"{name} {time / total:.0%}" for name, time in shares)
        self.say(
            f"profile: {summary}\nfor ui.perfetto.dev: {named}\n"
            f"for TensorBoard, with its profile plugin: tensorboard --logdir {self.folder}"
        )


def parts_of(program: str) -> dict[str, str]:
    """The part of the step that each instruction of a compiled program belongs to."""
    parts = {}
    for instruction, op_name in _INSTRUCTION.findall(program):
        scopes = _PART.findall(op_name)
        if scopes:
            backward = " (backward)" if "transpose(" in op_name else ""
            parts[instruction] = scopes[-1] + backward
    return parts


def write_named(trace: Path, named: Path, parts: dict[str, str]) -> dict[str, float]:
    """Copy a trace, the part put before the name of each instruction; returns the parts' times.

    The file of `start_trace(create_perfetto_trace=True)` has the compiler's names (`sort.0`), which
    on a CPU do not say what an instruction is for. Times are in microseconds, summed over
    devices and threads.
    """
    with gzip.open(trace, "rt", encoding="utf-8") as file:
        content = json.load(file)
    content.pop("metadata", None)
    times: dict[str, float] = {}
    for event in content["traceEvents"]:
        instruction = event.get("args", {}).get("hlo_op")
        if instruction is None or event["name"].startswith("end: "):
            continue
        part = parts.get(instruction)
        if part is not None:
            event["name"] = f"{part}: {event['name']}"
        if not _HOLDS_OTHERS.match(instruction):
            name = part or "other"
            times[name] = times.get(name, 0.0) + event.get("dur", 0.0)
    with gzip.open(named, "wt", encoding="utf-8") as file:
        json.dump(content, file)
    return times
