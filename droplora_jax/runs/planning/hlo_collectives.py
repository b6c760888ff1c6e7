"""The collectives of a compiled program, read from its text; each iteration of a loop counts."""

from __future__ import annotations

import math
import re
from collections import defaultdict
from collections.abc import Iterator
from dataclasses import dataclass

import numpy as np
from jax.sharding import Mesh

KINDS = ("all-gather", "all-reduce", "reduce-scatter", "all-to-all", "collective-permute")
BYTES = {"pred": 1, "s8": 1, "u8": 1, "s16": 2, "u16": 2, "bf16": 2, "f16": 2, "s32": 4} | {
    "u32": 4,
    "f32": 4,
    "s64": 8,
    "u64": 8,
    "f64": 8,
}

_COMPUTATION = re.compile(r"^(?:ENTRY )?%?([\w.\-]+) \(.*\) -> .* \{$")
_INSTRUCTION = re.compile(
    r"= (?P<shape>.*?) (?P<kind>" + "|".join(KINDS) + r")(?P<start>-start)?\("
)
_SHAPE = re.compile(r"\b(\w+)\[([\d,]*)\]")
_WHILE = re.compile(r" while\(.*condition=%?([\w.\-]+), body=%?([\w.\-]+)")
_TRIPS = re.compile(r'"known_trip_count":\{"n":"(\d+)"\}')
_CONSTANT = re.compile(r"constant\((\d+)\)")
_CALLED = re.compile(r"(?:calls|to_apply|true_computation|false_computation)=%?([\w.\-]+)")
_BRANCHES = re.compile(r"(?:branch_computations|called_computations)=\{([^}]*)\}")
_CHANNEL = re.compile(r"channel_id=(\d+)")
_GROUPS = re.compile(
    r"replica_groups=(\{\{.*?\}\}|\[[\d,]+\]<=\[[\d,]+\](?:T\([\d,]+\))?|"
    r"mesh\[[^\]]*\](?:, device_ids=\([^{]*\))? ?\{[^}]*\})"
)
_PAIRS = re.compile(r"source_target_pairs=\{([\d,{}]*)\}")


@dataclass(frozen=True)
class Collective:
    """All collectives of one kind over the same mesh axes in one run of a program.

    Attributes:
      axes: of the mesh, joined by `+`.
      count: how many are run, each iteration of a loop counted.
      bytes: that one device receives in all of them.
    """

    kind: str
    axes: str
    count: int
    bytes: int


def collectives(text: str, mesh: Mesh) -> list[Collective]:
    """The collectives of one run of a program, from its compiled text, largest first."""
    bodies, entry = _computations(text)
    # An asynchronous collective appears several times under one channel_id: start, steps (perhaps
    # in a loop) and end. Count it once, with the largest size and the smallest trip count.
    seen: dict[str, tuple[str, str, int, int]] = {}
    for line, times in _run(bodies, entry, 1):
        match = _INSTRUCTION.search(line)
        if match:
            kind, group = match.group("kind"), _first_group(line, mesh.size)
            size = _size(match.group("shape"), started=bool(match.group("start")))
            channel = _CHANNEL.search(line)
            key = channel.group(1) if channel else line
            received = int(size * _received(kind, len(group)))
            *_, fewest, most = seen.get(key, ("", "", times, 0))
            seen[key] = (kind, _axes(group, mesh), min(times, fewest), max(received, most))
    totals: dict[tuple[str, str], list[int]] = defaultdict(lambda: [0, 0])
    for kind, axes, times, received in seen.values():
        totals[kind, axes][0] += times
        totals[kind, axes][1] += times * received
    result = [Collective(kind, axes, *total) for (kind, axes), total in totals.items()]
    return sorted(result, key=lambda collective: -collective.bytes)


def _computations(text: str) -> tuple[dict[str, list[str]], str]:
    bodies: dict[str, list[str]] = {}
    entry, current = "", ""
    for line in text.splitlines():
        if head := _COMPUTATION.match(line):
            current = head.group(1)
            bodies[current] = []
            entry = current if line.startswith("ENTRY") else entry
        elif current:
            bodies[current].append(line)
    return bodies, entry


def _run(bodies: dict[str, list[str]], name: str, times: int) -> Iterator[tuple[str, int]]:
    """Every instruction, with how often it is run."""
    for line in bodies.get(name, ()):
        yield line, times
        if loop := _WHILE.search(line):
            condition, body = loop.groups()
            yield from _run(bodies, body, times * _trips(line, bodies.get(condition, [])))
            continue
        called = _CALLED.findall(line)
        for branches in _BRANCHES.findall(line):
            called += [branch.strip().lstrip("%") for branch in branches.split(",")]
        for other in called:
            yield from _run(bodies, other, times)


def _trips(line: str, condition: list[str]) -> int:
    """How often a loop is run: as the compiler says, or as it counts from 0 to a constant."""
    if known := _TRIPS.search(line):
        return int(known.group(1))
    limits = [int(n) for other in condition for n in _CONSTANT.findall(other)]
    return max([1, *limits])


def _size(shape: str, *, started: bool) -> int:
    """Bytes of a result; the shape of a `-start` lists the operands before it."""
    sizes = [
        BYTES.get(dtype, 0) * math.prod(int(n) for n in dims.split(",") if n)
        for dtype, dims in _SHAPE.findall(shape)
    ]
    if started and len(sizes) > 1:
        return max(sizes)
    return sum(sizes)


def _received(kind: str, devices: int) -> float:
    """Bytes that a device gets for each byte of its result, in a ring."""
    share = (devices - 1) / devices
    return {
        "all-gather": share,
        "all-reduce": 2 * share,
        "reduce-scatter": float(devices - 1),
        "all-to-all": share,
        "collective-permute": 1.0,
    }[kind]


def _axes(group: list[int], mesh: Mesh) -> str:
    """The mesh axes along which a group of devices differs."""
    places = np.array(np.unravel_index(group, mesh.devices.shape))
    differ = [name for name, row in zip(mesh.axis_names, places, strict=True) if len(set(row)) > 1]
    return "+".join(differ) or "none"


def _first_group(line: str, devices: int) -> list[int]:
    if pairs := _PAIRS.search(line):
        numbers = _numbers(pairs.group(1))
        moves = [[a, b] for a, b in zip(numbers[::2], numbers[1::2], strict=True) if a != b]
        return moves[0] if moves else [0]
    match = _GROUPS.search(line)
    if not match:
        return list(range(devices))
    text = match.group(1)
    if text.startswith("{{"):
        return [int(n) for n in text[2 : text.index("}")].split(",") if n]
    if text.startswith("mesh"):
        return _mesh_group(text, devices)
    # Iota: [groups, size]<=[dims]T(permutation)
    shape, order = text.split("<=")
    return _iota(order, devices).reshape(_numbers(shape))[0].tolist()


def _mesh_group(text: str, devices: int) -> list[int]:
    """`mesh['a'=2,'b'=4], device_ids=([2,2,2]T(1,0,2)) {'b'}`: the devices along some axes."""
    named = [(name, int(size)) for name, size in re.findall(r"'(\w+)'=(\d+)", text)]
    along = re.findall(r"'(\w+)'", text[text.rindex("{") :])
    order = text.partition("device_ids=(")[2]
    numbers = _iota(order, devices) if order else np.arange(devices)
    first = tuple(slice(None) if name in along else 0 for name, _ in named)
    return np.ravel(numbers.reshape([size for _, size in named])[first]).tolist()


def _iota(order: str, devices: int) -> np.ndarray:
    """`[dims]T(permutation)`: the devices counted in another order; or a list of them."""
    match = re.match(r"\[([\d,]+)\](?:T\(([\d,]+)\))?", order)
    if not match:
        return np.asarray(_numbers(order.partition("{")[0]))
    numbers = np.arange(devices).reshape(_numbers(match.group(1)))
    return numbers.transpose(_numbers(match.group(2))) if match.group(2) else numbers


def _numbers(text: str) -> list[int]:
    return [int(n) for n in re.findall(r"\d+", text)]
