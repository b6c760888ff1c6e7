"""Start the sides, see that they do the same work, and let them take turns."""

from __future__ import annotations

import time
from collections.abc import Iterator, Mapping
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass, field
from typing import Any

from work import Done, Work
from workers import Failed, Place, Ready, Result, Worker

# Relative, between the first losses, and between the first gradient norms, of two sides. In
# bfloat16 every layer rounds to 2**-9, and each side elsewhere.
TOLERANCES = {"float32": (1e-4, 1e-4), "bfloat16": (2e-3, 2e-2)}


class UnlikeWork(Exception):
    """Two sides were given, or compute, something else: there is nothing to compare."""


@dataclass(frozen=True)
class Plan:
    """How the turns are taken.

    Attributes:
      rounds, turns: rounds, and timed turns of a side in each of them.
      warmup: untimed turns of each side.
      pause: seconds between turns, in which the last side's threads stop spinning.
      alternate: the sides stay and take turns; otherwise one is through before the next starts,
        since an accelerator's memory holds one of them.
      clock: `wall`, or `cpu`: seconds of the cores.
      deadline: on `time.monotonic`'s clock, for all of it; None: there is none.
    """

    rounds: int = 5
    turns: int = 2
    warmup: int = 2
    pause: float = 0.5
    alternate: bool = True
    clock: str = "wall"
    deadline: float | None = None


@dataclass
class Record:
    """What is known of one side.

    Attributes:
      ready: when weights and factors were there.
      plain_loss: of the first rows before training, without masks.
      first: the first step, with whatever is compiled for it.
      done: the last turn.
      seconds: of every timed turn, [rounds][turns].
      resident, device: the most bytes in memory during those, and on an accelerator in all.
    """

    side: Any
    ready: Ready
    plain_loss: float
    first: Result
    done: Done | None = None
    seconds: list[list[float]] = field(default_factory=list)
    resident: int = 0
    device: int | None = None

    def add(self, results: list[Result], clock: str) -> None:
        """A round."""
        self.seconds.append([getattr(result, clock) for result in results])
        self.resident = max(self.resident, *(result.resident for result in results))
        self.device = results[-1].device


@dataclass
class Entry:
    worker: Worker
    record: Record


Outcome = Record | Failed


def measure(
    sides: Mapping[str, Any], work: Work, places: Mapping[str, Place], plan: Plan
) -> dict[str, Outcome]:
    """Every side's record, or why there is none.

    Args:
      places: by the sides' names.

    Raises:
      UnlikeWork: nothing should be made of the figures.
    """
    outcomes: dict[str, Outcome] = {}
    groups = [list(sides)] if plan.alternate else [[name] for name in sides]
    for group in groups:
        with ExitStack() as workers:
            entries = {}
            for name in group:
                with _failing(outcomes, name):
                    worker = Worker(sides[name], work, places[name], plan.deadline)
                    workers.callback(worker.stop)
                    entries[name] = Entry(worker, _begun(sides[name], worker))
                    outcomes[name] = entries[name].record
                say(name, outcomes[name])
                check_alike(_records(outcomes), work)
            _take_turns(entries, outcomes, plan)
            check_alike(_records(outcomes), work)
    return outcomes


def _begun(side: Any, worker: Worker) -> Record:
    plain = worker.call("plain_loss")[0].value if side.masked else None
    first = worker.call("first")[0]
    loss = first.value.loss if plain is None else plain
    return Record(side, worker.ready, loss, first)


def _take_turns(entries: dict[str, Entry], outcomes: dict[str, Outcome], plan: Plan) -> None:
    for number in range(plan.rounds + 1):
        for name, entry in entries.items():
            if isinstance(outcomes[name], Failed):
                continue
            with _failing(outcomes, name):
                results = entry.worker.call("run", plan.turns if number else plan.warmup)
                if number:
                    entry.record.add(results, plan.clock)
                entry.record.done = results[-1].value
            time.sleep(plan.pause)


@contextmanager
def _failing(outcomes: dict[str, Outcome], name: str) -> Iterator[None]:
    """What a side can't do is its outcome."""
    try:
        yield
    except Failed as failed:
        outcomes[name] = failed


def _records(outcomes: Mapping[str, Outcome]) -> dict[str, Record]:
    return {name: o for name, o in outcomes.items() if isinstance(o, Record)}


def say(name: str, outcome: Outcome) -> None:
    if isinstance(outcome, Failed):
        text = f"{'skipped: ' if outcome.kind == 'unavailable' else ''}{outcome}"
    else:
        done = outcome.first.value
        norm = "with masks" if outcome.side.masked else f"gradient norm {done.grad_norm:.5f}"
        text = (
            f"ready in {outcome.ready.seconds:.1f} s, first step {outcome.first.wall:.1f} s, loss "
            f"{outcome.plain_loss:.5f}, {norm}"
        )
    print(f"  {name}: {text}", flush=True)


def check_alike(records: Mapping[str, Record], work: Work) -> None:
    """Raise UnlikeWork unless all were given the same and computed the same at first."""
    loss_bound, norm_bound = TOLERANCES[work.dtype]
    names = sorted(records, key=lambda name: records[name].side.masked)
    for name in names[1:]:
        one, other = records[names[0]], records[name]
        _same(names[0], name, "tokens and targets", one.first.value.given, other.first.value.given)
        _near(names[0], name, "loss", one.plain_loss, other.plain_loss, loss_bound)
        if not (one.side.masked or other.side.masked):
            norms = (one.first.value.grad_norm, other.first.value.grad_norm)
            _near(names[0], name, "gradient norm", *norms, norm_bound)
        if one.done and other.done:
            _same(names[0], name, "a turn's tokens", one.done.given, other.done.given)


def _near(one: str, other: str, what: str, a: float, b: float, bound: float) -> None:
    if not abs(a - b) <= bound * abs(a):
        raise UnlikeWork(
            f"{one} and {other} do not compute the same: the first {what} is {a:.6f} and {b:.6f}, "
            f"more than {bound:.0e} apart"
        )


def _same(one: str, other: str, what: str, a: Any, b: Any) -> None:
    if a != b:
        raise UnlikeWork(f"{one} and {other} were not given the same {what}: {a} and {b}")
