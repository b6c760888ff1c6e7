"""Follows the steps of a run: stops it at a number that is not finite, logs it, and times it."""

from __future__ import annotations

import time
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from typing import Any, NoReturn

import jax
import numpy as np
import optax

from droplora_jax.core.finite import not_finite
from droplora_jax.training import progress
from droplora_jax.training.checkpoint import Checkpoints, flatten
from droplora_jax.training.metrics_log import MetricsLog
from droplora_jax.training.step import TrainState


class NonFinite(Exception):
    """A loss, a gradient, an evaluation or the state of a run is not finite any more."""

    def __init__(self, step: int, what: str, good: int | None) -> None:
        """
        Args:
          what: the numbers that are not finite, in words.
          good: the step of the newest checkpoint, if there is one.
        """
        kept = f"the last good checkpoint, step {good}, is kept" if good else "no checkpoint yet"
        super().__init__(
            f"step {step}: {what}: stopped; {kept}. A lower optim.learning_rate or a longer "
            "warm-up usually helps"
        )
        self.step = step


class Watch:
    """Follows the steps: the guard, the log, the speed.

    A step's numbers are read when the next step has been sent off, so that the device never waits
    for the guard; before anything is saved they are read at once.
    """

    def __init__(
        self,
        every: int,
        total: int,
        schedule: optax.Schedule,
        log: MetricsLog,
        checkpoints: Checkpoints,
        show: progress.Show,
    ) -> None:
        """
        Args:
          every: steps between rows of the log; the last of `total` has one too.
          schedule: the learning rates.
        """
        self.every, self.total, self.schedule = every, total, schedule
        self.log, self.checkpoints, self.show = log, checkpoints, show
        self._pending: tuple[int, Mapping[str, jax.Array]] | None = None
        self._tokens = 0
        self._since: float | None = None  # None while the first step compiles

    def after(self, step: int, metrics: Mapping[str, jax.Array]) -> None:
        self.settle()
        self._pending = (step, metrics)
        if self._since is None or self.due(step, self.every):
            self.settle()

    def settle(self) -> None:
        """Read the last step's numbers, stop if one is not finite, log them if it is time."""
        if self._pending is None:
            return
        step, metrics = self._pending[0], jax.device_get(self._pending[1])
        self._pending = None
        if not (np.isfinite(metrics["loss"]) and np.isfinite(metrics["grad_norm"])):
            self._stop(step, f"loss {metrics['loss']}, gradient norm {metrics['grad_norm']}")
        self._tokens += int(metrics["tokens"])
        row = self._row(step, metrics) if self.due(step, self.every) else None
        if self._since is None:
            self._since, self._tokens = time.perf_counter(), 0
        if row:
            self.write(row)
        else:
            self.show(step, None)

    def check_numbers(self, step: int, numbers: Mapping[str, float]) -> None:
        """Stop the run unless the numbers of an evaluation are all finite.

        Raises:
          NonFinite: names those that are not.
        """
        bad = [f"{name} {value}" for name, value in numbers.items() if not np.isfinite(value)]
        if bad:
            self._stop(step, ", ".join(bad))

    def check_state(self, step: int, state: TrainState) -> None:
        """Stop the run unless every value of the state is finite: before it is saved or judged.

        Raises:
          NonFinite: names an array that is not.
        """
        if names := not_finite(flatten(state)):
            self._stop(step, f"{names[0]} is not finite ({len(names)} arrays in all)")

    def _stop(self, step: int, what: str) -> NoReturn:
        self.checkpoints.wait()  # a checkpoint that is still being saved is the last good one
        raise NonFinite(step, what, self.checkpoints.latest)

    @contextmanager
    def pause(self) -> Iterator[None]:
        """Time that is not the training's, and does not count in its speed."""
        start = time.perf_counter()
        yield
        if self._since is not None:
            self._since += time.perf_counter() - start

    def write(self, row: Mapping[str, Any]) -> None:
        self.show(row["step"], row)
        self.log.write({name: value for name, value in row.items() if name != "seconds_left"})
        if "loss" not in row:  # an evaluation
            self.log.plot()

    def due(self, step: int, every: int) -> bool:
        """Whether it is time for what happens every so many steps, and after the last."""
        return step % every == 0 or step == self.total

    def _row(self, step: int, metrics: Mapping[str, Any]) -> dict[str, Any]:
        row = {
            "step": step,
            "loss": float(metrics["loss"]),
            "learning_rate": float(self.schedule(step - 1)),
            "grad_norm": float(metrics["grad_norm"]),
            "tokens": int(metrics["tokens"]),
        }
        if self._since is not None and self._tokens:
            now = time.perf_counter()
            row["tokens_per_second"] = self._tokens / (now - self._since)
            per_step = row["tokens_per_second"] / max(row["tokens"], 1)
            row["seconds_left"] = (self.total - step) / per_step
            self._since, self._tokens = now, 0
        return row
