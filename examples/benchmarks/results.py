"""What was measured, as ratios, a table, JSON and a picture."""

from __future__ import annotations

import json
import textwrap
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any, Literal

import numpy as np
from turns import Outcome, Record
from work import Work
from workers import Failed

MIB = 2**20


@dataclass(frozen=True)
class Pair:
    """Two sides to compare, and what is aimed at.

    Attributes:
      what: `speed`: how many times as fast `one` is; `time`: the inverse; `memory`: how much of
        the memory of `other` it takes.
      goal: speed at least, or time or memory at most.
    """

    one: str
    other: str
    what: Literal["speed", "time", "memory"]
    goal: float | None = None


@dataclass(frozen=True)
class Ratio:
    """A pair's ratio: its median over the rounds, and its extremes."""

    pair: Pair
    ratio: float
    low: float
    high: float

    @property
    def met(self) -> bool | None:
        if self.pair.goal is None:
            return None
        at_least = self.pair.what == "speed"
        return self.ratio >= self.pair.goal if at_least else self.ratio <= self.pair.goal


@dataclass(frozen=True)
class Comparison:
    """One part of the suite, measured.

    Attributes:
      setting: what else to write down: the date, the hardware, the arguments.
      peak: operations a second of a matrix product, if the part of it that is used is wanted.
    """

    part: str
    title: str
    work: Work
    outcomes: Mapping[str, Outcome]
    pairs: Sequence[Pair]
    setting: Mapping[str, Any]
    peak: float | None = None

    @property
    def records(self) -> dict[str, Record]:
        return {name: o for name, o in self.outcomes.items() if isinstance(o, Record)}

    @property
    def ratios(self) -> list[Ratio]:
        """Of the pairs of which both have figures."""
        records = self.records
        return [
            _ratio(pair, records[pair.one], records[pair.other], self.work)
            for pair in self.pairs
            if pair.one in records and pair.other in records
        ]


def figures(record: Record, work: Work, peak: float | None) -> dict[str, Any]:
    """The figures of one side."""
    assert record.done is not None
    turn = float(np.median(record.seconds))
    step = turn / record.done.steps
    own: dict[str, Any] = {
        "seconds": record.seconds,
        "turn_seconds": turn,
        "step_seconds": step,
        "steps": record.done.steps,
        "trained_tokens_per_second": work.labels / turn,
        "ready_seconds": record.ready.seconds,
        "first_step_seconds": record.first.wall,
        "time_to_first_step": record.ready.seconds + record.first.wall,
        "compile_seconds": max(record.first.wall - step, 0.0),
        "resident_before": record.ready.resident,
        "resident_first_step": record.first.resident,
        "resident": record.resident,
        "memory": held(record, work),
        "device_peak": record.device,
        "first_loss": record.plain_loss,
        "first_grad_norm": None if record.side.masked else record.first.value.grad_norm,
        "given": asdict(record.done.given),
        "versions": record.ready.versions,
        "options": asdict(record.side),
    }
    if peak:
        rows, length = len(work.rows), len(work.rows[0].ids) - 1
        own["mfu"] = work.shape.useful_flops(rows, length) / turn / peak
    return own


def held(record: Record, work: Work) -> int:
    """Bytes: the accelerator's peak, or what is resident in training above the base weights."""
    return record.resident - work.weight_bytes if record.device is None else record.device


def _ratio(pair: Pair, one: Record, other: Record, work: Work) -> Ratio:
    if pair.what == "memory":
        ratio = held(one, work) / held(other, work)
        return Ratio(pair, ratio, ratio, ratio)
    above, below = (one, other) if pair.what == "time" else (other, one)
    by_round = np.median(above.seconds, axis=1) / np.median(below.seconds, axis=1)
    return Ratio(pair, float(np.median(by_round)), float(by_round.min()), float(by_round.max()))


def table(comparison: Comparison) -> str:
    """Markdown; a side without figures says why."""
    work, peak = comparison.work, comparison.peak
    memory = "GPU peak, MiB" if work.device == "gpu" else "above the weights (before a step), MiB"
    head = ["", "s/step", "trained tokens/s", memory, "compile, s", "to first step, s"]
    head += ["MFU"] if peak else []
    rows = [head, ["---", *["---:"] * (len(head) - 1)]]
    for name, outcome in comparison.outcomes.items():
        if isinstance(outcome, Failed):
            rows.append([name, str(outcome), *[""] * (len(head) - 2)])
            continue
        own = figures(outcome, work, peak)
        cells = [
            f"{own['step_seconds']:.3f}",
            f"{own['trained_tokens_per_second']:,.0f}",
            _memory(own, outcome, work),
            f"{own['compile_seconds']:.1f}",
            f"{own['time_to_first_step']:.1f}",
        ]
        rows.append([name, *cells, *([f"{own['mfu']:.1%}"] if peak else [])])
    return "\n".join(f"| {' | '.join(row)} |" for row in rows)


def _memory(own: Mapping[str, Any], record: Record, work: Work) -> str:
    text = f"{own['memory'] / MIB:,.0f}"
    if record.device is not None:
        return text
    return f"{text} ({(record.ready.resident - work.weight_bytes) / MIB:,.0f})"


def ratio_table(comparison: Comparison) -> str:
    """Markdown; a pair without figures says so."""
    rows = ["| what | ratio (min..max of rounds) | aim |", "|---|---|---|"]
    found = {own.pair: own for own in comparison.ratios}
    for pair in comparison.pairs:
        name = f"{pair.what}, {pair.one} / {pair.other}"
        bound = "at least" if pair.what == "speed" else "at most"
        aim = "" if pair.goal is None else f"{bound} {pair.goal}"
        if (own := found.get(pair)) is None:
            rows.append(f"| {name} | not measured | {aim} |")
            continue
        spread = "" if pair.what == "memory" else f" ({own.low:.2f}..{own.high:.2f})"
        verdict = "" if own.met is None else f": {'met' if own.met else 'not met'}"
        rows.append(f"| {name} | {own.ratio:.2f}{spread} | {aim}{verdict} |")
    return "\n".join(rows)


def write(folder: Path, comparison: Comparison) -> None:
    """`PART.json` and `PART.png` in the folder; older ones are replaced."""
    folder.mkdir(parents=True, exist_ok=True)
    work, part = comparison.work, comparison.part
    sides = {
        name: {"failed": o.kind, "why": str(o)}
        if isinstance(o, Failed)
        else figures(o, work, comparison.peak)
        for name, o in comparison.outcomes.items()
    }
    record = {
        "part": part,
        "title": comparison.title,
        **comparison.setting,
        "matrix_peak": comparison.peak,
        "sides": sides,
        "ratios": [
            {**asdict(own.pair), "ratio": own.ratio, "low": own.low, "high": own.high}
            for own in comparison.ratios
        ],
    }
    (folder / f"{part}.json").write_text(json.dumps(record, indent=2) + "\n", encoding="utf-8")
    plot(folder / f"{part}.png", comparison.title, sides, work)


def plot(file: Path, title: str, sides: Mapping[str, Mapping[str, Any]], work: Work) -> None:
    """Speed, every turn a dot, and memory, side by side."""
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    figure = Figure(figsize=(11, 1.4 + 0.5 * len(sides)), layout="constrained")
    FigureCanvasAgg(figure)
    speed, memory = figure.subplots(1, 2, sharey=True)
    for y, own in enumerate(sides.values()):
        if "failed" in own:
            speed.annotate(own["why"], (0, y), xytext=(4, -3), textcoords="offset points")
            continue
        ours = "drop_rate" in own["options"]
        style = {"color": "tab:blue" if ours else "tab:gray", "alpha": 0.8}
        rate = own["trained_tokens_per_second"]
        rates = rate * own["turn_seconds"] / np.ravel(own["seconds"])
        speed.barh(y, rate, **style)
        speed.plot(rates, [y] * len(rates), ".", color="black", markersize=4)
        memory.barh(y, own["memory"] / MIB, **style)
    speed.set_yticks(range(len(sides)), list(sides))
    speed.invert_yaxis()
    speed.set(xlabel="trained tokens a second (median; every turn a dot)")
    where = "peak on the GPU" if work.device == "gpu" else "resident above the base weights"
    memory.set(xlabel=f"MiB {where}")
    for axes in (speed, memory):
        axes.locator_params(axis="x", nbins=6)
        axes.grid(axis="x", alpha=0.3)
        axes.set_axisbelow(True)
    figure.suptitle(textwrap.fill(title, 140), fontsize=10)
    figure.savefig(file, dpi=120)
