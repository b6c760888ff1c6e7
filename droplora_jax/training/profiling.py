"""A trace of some steps of a run, for Perfetto and TensorBoard, with the step's parts by name."""

from __future__ import annotations

import gzip
import json
import re
from collections.abc import Callable, Mapping
from pathlib import Path
from types import MappingProxyType
from typing import Any

import jax

# The names given with `jax.named_scope`, in the models, `lowrank`, `loss` and `step`.
# Of `layers` it is what joins them: the scan, and keeping and reading what the backward pass needs.
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

# Of the compiler, by platform, for a program that is traced: a GPU runs what is in a command buffer
# as one, and then a trace does not say what each kernel is of.
COMPILER_OPTIONS: Mapping[str, Mapping[str, str]] = MappingProxyType(
    {"gpu": MappingProxyType({"xla_gpu_enable_command_buffer": ""})}
)

_PART = re.compile(rf"\b({'|'.join(PARTS)})\b")
_INSTRUCTION = re.compile(r'^\s*(?:ROOT )?%?([\w.-]+) = .*metadata=\{.*?op_name="([^"]*)"', re.M)
_HOLDS_OTHERS = re.compile(r"while|call|conditional")  # their time is that of what they hold


class Profile:
    """Traces the steps from `first` to `last` into a folder, in one process of the run.

    To be called in place of the step; `close`, after `last` or when the run ends before it, writes
    what was traced.
    """

    def __init__(self, folder: Path, first: int, last: int, say: Callable[[str], None]) -> None:
        self.folder, self.first, self.last, self.say = folder, first, last, say
        self._tracing: Any = None  # the executable whose steps are being traced
        self._last_made: Any = None  # its last metrics

    def __call__(self, number: int, step: Any, state: Any, *arguments: Any) -> Any:
        """`step(state, *arguments)`, the run's step of this number."""
        if not self.first <= number <= self.last:
            return step(state, *arguments)
        if self._tracing is None:
            jax.block_until_ready(state)
            options = jax.profiler.ProfileOptions()
            options.python_tracer_level = 0  # every call of Python's: more than the step itself
            jax.profiler.start_trace(self.folder, profiler_options=options)
            self._tracing = step
        with jax.profiler.StepTraceAnnotation("train", step_num=number):
            made = step(state, *arguments)
        self._last_made = made[1]
        return made

    def close(self) -> None:
        """Write what was traced, if anything is being traced."""
        if self._tracing is None:
            return
        step, self._tracing = self._tracing, None
        jax.block_until_ready(self._last_made)
        jax.profiler.stop_trace()
        traces = self.folder.glob("plugins/profile/*/*.trace.json.gz")
        trace = max(traces, key=lambda file: file.stat().st_mtime)
        named = trace.with_name("perfetto_trace.json.gz")
        times = write_named(trace, named, parts_of(step.as_text()))
        shares = sorted(times.items(), key=lambda item: -item[1])
        total = sum(times.values()) or 1.0
        said = ", ".join(f"{name} {time / total:.0%}" for name, time in shares)
        self.say(
            f"profile: {said}\nfor ui.perfetto.dev: {named}\n"
            f"for TensorBoard, with its profile plugin: tensorboard --logdir {self.folder}"
        )


def parts_of(program: str) -> dict[str, str]:
    """The part of the step that each instruction of a compiled program belongs to."""
    parts = {}
    for instruction, op_name in _INSTRUCTION.findall(program):
        found = _PART.findall(op_name)
        if found:
            backward = " (backward)" if "transpose(" in op_name else ""
            parts[instruction] = found[-1] + backward
    return parts


def write_named(trace: Path, named: Path, parts: dict[str, str]) -> dict[str, float]:
    """Copy a trace, the part put before the name of each instruction; returns the parts' times.

    JAX's own trace has the compiler's names alone on some platforms, and `metadata`, which
    Perfetto does not read. Times are in microseconds, summed over devices and threads.
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
