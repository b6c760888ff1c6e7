"""Follows the steps of a run: stops it at a number that is not finite, logs it, and times it."""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from typing import NoReturn

import jax
import numpy as np

from droplora_jax.core.files import Row
from droplora_jax.core.finite import not_finite
from droplora_jax.training.checkpoint import flatten
from droplora_jax.training.metrics_log import MetricsLog
from droplora_jax.training.progress import Show
from droplora_jax.training.step import TrainState


class NonFinite(Exception):
    """A loss, a gradient, an evaluation or the state of a run is not finite any more."""

    def __init__(self, step: int, what: str, saved_step: int | None) -> None:
        """
        Args:
          what: the numbers that are not finite, in words.
          saved_step: the step of the newest checkpoint, if there is one.
        """
        kept = (
            f"the last good checkpoint, step {saved_step}, is kept"
            if saved_step
            else "no checkpoint yet"
        )
        super().__init__(
            f"step {step}: {what}: stopped; {kept}. A lower optim.learning_rate or a longer "
            "warm-up usually helps"
        )
        self.step = step


class Monitor:
    """Follows the steps of a run: the guard against non-finite numbers, the log, the speed.

    The numbers of a step are read when the next step has been dispatched, so that the device never
    waits for the guard; before anything is saved they are read at once.
    """

    def __init__(
        self,
        log_every: int,
        total_steps: int,
        learning_rate: Callable[[int], float | jax.Array],
        *,
        log: MetricsLog | None,
        show: Show,
        newest_checkpoint: Callable[[], int | None],
    ) -> None:
        """
        Args:
          log_every: steps between rows of the log; the last step has one too.
          learning_rate: the rate of a step, counted from 0.
          log: None in all processes of a run but the first.
          show: tells a person of a step.
          newest_checkpoint: the step of the newest one, after waiting for a save in progress.
        """
        self.log_every, self.total_steps, self.learning_rate = log_every, total_steps, learning_rate
        self.log, self.show, self.newest_checkpoint = log, show, newest_checkpoint
        self._pending: tuple[int, Mapping[str, jax.Array]] | None = None
        self._tokens = 0
        self._since: float | None = None  # None while the first step compiles

    def after(self, step: int, metrics: Mapping[str, jax.Array]) -> None:
        """Take the numbers of `step`, which may still be running, and read those before it."""
        self.settle()
        self._pending = (step, metrics)
        if self._since is None or self.due(step, self.log_every):
            self.settle()

    def settle(self) -> None:
        """Read the last step's numbers, stop if one is not finite, log them if it is time.

        Raises:
          NonFinite: the loss or the norm of the gradient.
        """
        if self._pending is None:
            return
        step, metrics = self._pending[0], jax.device_get(self._pending[1])
        self._pending = None
        if not (np.isfinite(metrics["loss"]) and np.isfinite(metrics["grad_norm"])):
            self._stop(step, f"loss {metrics['loss']}, gradient norm {metrics['grad_norm']}")
        self._tokens += int(metrics["tokens"])
        row = self._row(step, metrics) if self.due(step, self.log_every) else None
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
        """Stop the run unless every value of the state is finite: before it is saved or evaluated.

        Raises:
          NonFinite: names an array that is not.
        """
        if names := not_finite(flatten(state)):
            self._stop(step, f"{names[0]} is not finite ({len(names)} arrays in all)")

    def _stop(self, step: int, what: str) -> NoReturn:
        raise NonFinite(step, what, self.newest_checkpoint())

    @contextmanager
    def pause(self) -> Iterator[None]:
        """Time that is not the training's, and does not count in its speed."""
        start = time.perf_counter()
        yield
        if self._since is not None:
            self._since += time.perf_counter() - start

    def write(self, row: Row) -> None:
        """Show a row, and write it to the log."""
        self.show(row["step"], row)
        if self.log is None:
            return
        self.log.write({name: value for name, value in row.items() if name != "seconds_left"})
        if "loss" not in row:  # an evaluation
            self.log.plot()

    def due(self, step: int, every: int) -> bool:
        """Whether it is time for what happens every so many steps, and after the last."""
        return step % every == 0 or step == self.total_steps

    def _row(self, step: int, metrics: Mapping[str, np.ndarray]) -> Row:
        row: Row = {
            "step": step,
            "loss": float(metrics["loss"]),
            "learning_rate": float(self.learning_rate(step - 1)),
            "grad_norm": float(metrics["grad_norm"]),
            "tokens": int(metrics["tokens"]),
        }
        if self._since is not None and self._tokens:
            now = time.perf_counter()
            row["tokens_per_second"] = self._tokens / (now - self._since)
            per_step = row["tokens_per_second"] / max(row["tokens"], 1)
            row["seconds_left"] = (self.total_steps - step) / per_step
            self._since, self._tokens = now, 0
        return row
