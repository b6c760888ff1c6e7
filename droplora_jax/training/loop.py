"""The loop: data in, steps, guard, evaluation, checkpoints, and what a person sees."""

from __future__ import annotations

import signal
import time
from collections.abc import Mapping
from concurrent.futures import Future
from contextlib import closing
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path
from typing import Any

import grain
import jax
from flax import nnx
from rich.console import Console

from droplora_jax.adapters.surgery import initial_of, split
from droplora_jax.core import distributed, prng, signals
from droplora_jax.core.console import say
from droplora_jax.core.errors import InputError
from droplora_jax.data.batches import Batches
from droplora_jax.data.device_feed import fed
from droplora_jax.models.decoder import Decoder
from droplora_jax.training import optimizer, progress
from droplora_jax.training.checkpoint import Checkpoints
from droplora_jax.training.compiled_step import Program
from droplora_jax.training.config import TrainConfig, total_steps
from droplora_jax.training.evaluation import Measure, Measured
from droplora_jax.training.metrics_log import MetricsLog, NoLog
from droplora_jax.training.monitor import NonFinite, Watch
from droplora_jax.training.profiling import Profile
from droplora_jax.training.step import TrainState, init_state


class Stopped(Exception):
    """A signal asked the run to stop, and it saved first."""

    def __init__(self, number: int, step: int) -> None:
        super().__init__(f"stopped by {signal.Signals(number).name}: step {step} is saved")
        self.exit_code = 128 + number


@dataclass
class Run:
    """Everything that one run consists of, loaded and checked.

    Attributes:
      program: its step, which may be in the making.
      began, weights_seconds: when (`time.perf_counter`) the run did, and what of the time since
        then its weights took.
    """

    model: Decoder
    program: Future[Program]
    mesh: jax.sharding.Mesh
    train: Batches
    measured: Measured
    optim: optimizer.OptimConfig
    config: TrainConfig
    seed: int
    folder: Path
    record: Mapping[str, Any]
    console: Console
    began: float
    weights_seconds: float

    def __post_init__(self) -> None:
        self.config.check_mesh(self.mesh, self.train.max_length)
        self.steps = total_steps(self.config, self.train)
        self.schedule = optimizer.learning_rate(self.optim, self.steps)
        self.mask_root = prng.fold_name(prng.root_key(self.seed), "mask")

    def feed(self, start: int) -> grain.DatasetIterator[Any]:
        """The global batches from step `start` on, on the mesh, as microbatches [k, m, T]."""
        numbers = self.train.numbers[: self.steps]
        split = numbers.map(lambda lines: lines.reshape(-1, self.config.rows_per_pass))
        return fed(self.train, split, self.mesh, start=start)

    def profile(self) -> Profile:
        """Traces `train.profile_steps`; of several processes the first one does."""
        first, last = self.config.profile_steps or (0, 0)  # there is no step 0
        if not distributed.first():
            first = last = 0
        return Profile(self.folder / "profile", first, last, partial(say, self.console))


def train(run: Run) -> Decoder:
    """Train from the newest checkpoint, or from the start, to the last step.

    Raises:
      NonFinite: a loss, a gradient, an evaluation or the state is not finite; it was not saved.
      Stopped: SIGINT or SIGTERM; the state was saved.
      InputError: a file could not be written.
    """
    graphdef, adapters, mask_keys, frozen = split(run.model)
    tx = optimizer.optimizer(run.optim, run.schedule)
    checkpoints = Checkpoints(run.folder / "checkpoints", keep=run.config.keep)
    fresh = replace(init_state(adapters, tx), initial=initial_of(frozen))
    saved = checkpoints.restore_newest(fresh, partial(say, run.console))
    state, frozen = replace(saved, initial=None), nnx.merge_state(frozen, saved.initial)
    measure = run.measured.by(graphdef, mask_keys, frozen, run.mesh)
    start = int(state.step)
    log = MetricsLog(run.folder, step=start) if distributed.first() else NoLog()
    agreed = distributed.Agreement(run.mesh)
    try:
        program = run.program.result()
        if program.why:
            say(run.console, program.why)
        with (
            signals.collected(run.config.stop_seconds, partial(_late, run, checkpoints)) as stop,
            progress.progress(run.console, start=start, total=run.steps) as show,
            closing(run.feed(start)) as batches,
            closing(run.profile()) as profile,
        ):
            watch = Watch(run.config.log_every, run.steps, run.schedule, log, checkpoints, show)
            for n in range(start, run.steps):
                arguments = (state, mask_keys, frozen, next(batches), run.mask_root)
                state, metrics = profile(n + 1, program.step, *arguments)
                watch.after(n + 1, metrics)
                if n + 1 == profile.last:
                    with watch.pause():
                        profile.close()
                if n == start:
                    say(run.console, _start_up(run, program))
                signal_number = agreed(stop[0] if stop else 0)
                whole = replace(state, initial=saved.initial)
                _look_and_save(run, watch, measure, whole, n + 1, signal_number)
        checkpoints.wait()
        log.plot()
    except (NonFinite, Stopped):
        log.plot()
        raise
    except OSError as error:
        raise InputError(
            f"{run.folder}: could not be written ({error.strerror or error}). Of the checkpoints, "
            f"{checkpoints.kept()}. Make room and run the same command again"
        ) from error
    finally:
        log.close()
        checkpoints.close()
    return nnx.merge(graphdef, state.adapters, mask_keys, frozen)


def _start_up(run: Run, program: Program) -> str:
    """Where the time went until the first step was made; two of its parts, side by side."""
    return (
        f"first step after {time.perf_counter() - run.began:.1f} s "
        f"(weights {run.weights_seconds:.1f}, compiling {program.seconds:.1f})"
    )


def _late(run: Run, checkpoints: Checkpoints) -> str:
    return (
        f"SIGTERM came {run.config.stop_seconds} seconds ago (train.stop_seconds) and the state "
        f"could not be saved since; {checkpoints.kept()}"
    )


def _look_and_save(
    run: Run, watch: Watch, measure: Measure | None, state: TrainState, step: int, stop: int
) -> None:
    """Whatever is due after `step`: evaluation, a checkpoint, and the stop that a signal asks.

    `stop` is the signal's number, or 0.
    """
    config, checkpoints = run.config, watch.checkpoints
    score = None
    save = watch.due(step, config.save_every) or bool(stop)
    evaluate = measure is not None and watch.due(step, config.eval_every)
    if save or evaluate:
        watch.settle()
        watch.check_state(step, state)
    if measure is not None and evaluate:
        with watch.pause():
            numbers = measure(state.adapters)
        watch.check_numbers(step, numbers)
        watch.write({"step": step, **numbers})
        score = run.measured.score(numbers)
        save |= checkpoints.best_score is None or score > checkpoints.best_score
    if save:
        checkpoints.save(state, run.record, score)
    if stop and step < run.steps:
        checkpoints.wait()
        raise Stopped(stop, step)
