"""The training loop: batches in, steps, guard, evaluation, checkpoints, and progress."""

from __future__ import annotations

import signal
import time
from concurrent.futures import Future
from contextlib import closing
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path
from typing import NamedTuple

import grain
import jax
from flax import nnx
from rich.console import Console

from droplora_jax.adapters.surgery import initial_of, split
from droplora_jax.core import distributed, prng, signals
from droplora_jax.core.console import say
from droplora_jax.core.errors import InputError
from droplora_jax.data.batch import Batch
from droplora_jax.data.batches import Batches
from droplora_jax.data.device_feed import feed
from droplora_jax.models.decoder import Decoder
from droplora_jax.nn.options import StepOptions
from droplora_jax.training.checkpoint import Checkpoints, Record
from droplora_jax.training.compiled_step import CompiledStep
from droplora_jax.training.config import TrainConfig
from droplora_jax.training.evaluation import Evaluate, Evaluation
from droplora_jax.training.metrics_log import MetricsLog
from droplora_jax.training.monitor import Monitor, NonFinite
from droplora_jax.training.optimizer import Optimizer
from droplora_jax.training.profiling import Profile
from droplora_jax.training.progress import progress
from droplora_jax.training.step import TrainState, init_state


class Stopped(Exception):
    """A signal asked the run to stop, and it saved first."""

    def __init__(self, number: int, step: int) -> None:
        super().__init__(f"stopped by {signal.Signals(number).name}: step {step} is saved")
        self.exit_code = 128 + number


@dataclass(frozen=True)
class Run:
    """Everything that one run consists of, loaded and checked.

    Attributes:
      compiled: its step, which may still be compiling.
      options: how the layers are computed in evaluations.
      record: what a checkpoint says of the run, as JSON.
      began: when the run did (`time.perf_counter`).
      weights_seconds: how long reading the weights took.
    """

    model: Decoder
    compiled: Future[CompiledStep]
    mesh: jax.sharding.Mesh
    train: Batches
    evaluation: Evaluation
    options: StepOptions
    optim: Optimizer
    steps: int
    config: TrainConfig
    seed: int
    folder: Path
    record: Record
    console: Console
    began: float
    weights_seconds: float

    def feed(self, start: int) -> grain.DatasetIterator[Batch]:
        """The global batches from step `start` on, on the mesh, as microbatches [k, m, T]."""
        microbatches = self.config.global_batch // self.config.rows_per_pass
        indices = self.train.indices[: self.steps]
        return feed(self.train, indices, self.mesh, start=start, microbatches=microbatches)

    def profile(self, compiled: CompiledStep) -> Profile:
        """Traces `train.profile_steps`, in the first process of a run."""
        first, last = self.config.profile_steps or (0, 0)  # there is no step 0
        if not distributed.first():
            first = last = 0
        return Profile(
            self.folder / "profile", first, last, compiled.step, partial(say, self.console)
        )


class _Parts(NamedTuple):
    """A run's parts that stay the same from step to step.

    Attributes:
      frozen: the base, and the initial factors that branches are measured from.
      initial: the latter, for checkpoints.
      log: None in all processes but the first.
    """

    run: Run
    compiled: CompiledStep
    mask_keys: nnx.State
    frozen: nnx.State
    initial: nnx.State
    checkpoints: Checkpoints
    log: MetricsLog | None
    evaluate: Evaluate | None


def train(run: Run) -> Decoder:
    """Train from the newest checkpoint, or from the start, to the last step.

    Raises:
      NonFinite: a loss, a gradient, an evaluation or the state is not finite; it was not saved.
      Stopped: SIGINT or SIGTERM; the state was saved.
      InputError: a file could not be written.
    """
    with Checkpoints(run.folder / "checkpoints", keep=run.config.keep) as checkpoints:
        return _trained(run, checkpoints)


def _trained(run: Run, checkpoints: Checkpoints) -> Decoder:
    graphdef, adapters, mask_keys, frozen = split(run.model)
    fresh = replace(init_state(adapters, run.optim.tx), initial=initial_of(frozen))
    saved = checkpoints.restore_newest(fresh, partial(say, run.console))
    state, frozen = replace(saved, initial=None), nnx.merge_state(frozen, saved.initial)
    evaluate = run.evaluation.function(graphdef, mask_keys, frozen, run.mesh, run.options)
    log = MetricsLog(run.folder, step=int(state.step)) if distributed.first() else None
    try:
        compiled = run.compiled.result()
        if compiled.reason:
            say(run.console, compiled.reason)
        parts = _Parts(run, compiled, mask_keys, frozen, saved.initial, checkpoints, log, evaluate)
        state = _steps(parts, state)
        checkpoints.wait()
        if log:
            log.plot()
    except (NonFinite, Stopped):
        if log:
            log.plot()
        raise
    except OSError as error:
        raise InputError(
            f"{run.folder}: could not be written ({error.strerror or error}). Checkpoints: "
            f"{checkpoints.kept()}. Make room and run the same command again"
        ) from error
    finally:
        if log:
            log.close()
    return nnx.merge(graphdef, state.adapters, mask_keys, frozen)


def _steps(parts: _Parts, state: TrainState) -> TrainState:
    """The state after the last step, from that of the newest checkpoint."""
    run, checkpoints, train_step = parts.run, parts.checkpoints, parts.compiled.step
    mask_root, start = prng.run_keys(run.seed).mask, int(state.step)
    agreed = distributed.Agreement(run.mesh)
    last_words = partial(_too_late, run, checkpoints)
    with (
        signals.collected(run.config.stop_seconds, last_words) as received,
        progress(run.console, start=start, total=run.steps) as show,
        closing(run.feed(start)) as batches,
        closing(run.profile(parts.compiled)) as profile,
    ):
        monitor = Monitor(
            run.config.log_every,
            run.steps,
            run.optim.learning_rate,
            log=parts.log,
            show=show,
            newest_checkpoint=checkpoints.newest_saved,
        )
        for step in range(start + 1, run.steps + 1):
            batch = next(batches)
            with profile.step(step, state):
                state, metrics = train_step(state, parts.mask_keys, parts.frozen, batch, mask_root)
            monitor.after(step, metrics)
            if step == profile.last:
                with monitor.pause():
                    profile.close(metrics)
            if step == start + 1:
                say(run.console, _start_up(run, parts.compiled))
            stop = agreed(received[0] if received else 0)
            _evaluate_and_save(parts, monitor, replace(state, initial=parts.initial), step, stop)
    return state


def _evaluate_and_save(
    parts: _Parts, monitor: Monitor, state: TrainState, step: int, stop: int
) -> None:
    """Whatever is due after `step`: an evaluation, a checkpoint, and the end of a stopped run.

    Args:
      stop: the number of the signal that asks the run to stop, or 0.
    """
    run, checkpoints, evaluate = parts.run, parts.checkpoints, parts.evaluate
    score = None
    save = monitor.due(step, run.config.save_every) or bool(stop)
    judged = evaluate is not None and monitor.due(step, run.config.eval_every)
    if save or judged:
        monitor.settle()
        monitor.check_state(step, state)
    if evaluate is not None and judged:
        with monitor.pause():
            numbers = evaluate(state.adapters)
        monitor.check_numbers(step, numbers)
        monitor.write({"step": step, **numbers})
        score = run.evaluation.score(numbers)
        save |= checkpoints.best_score is None or score > checkpoints.best_score
    if save:
        checkpoints.save(state, run.record, score)
    if stop and step < run.steps:
        checkpoints.wait()
        raise Stopped(stop, step)


def _start_up(run: Run, compiled: CompiledStep) -> str:
    """How long the first step took to come; weights and compilation run side by side."""
    return (
        f"first step after {time.perf_counter() - run.began:.1f} s "
        f"(weights {run.weights_seconds:.1f}, compiling {compiled.seconds:.1f})"
    )


def _too_late(run: Run, checkpoints: Checkpoints) -> str:
    return (
        f"SIGTERM came {run.config.stop_seconds} seconds ago (train.stop_seconds) and the state "
        f"could not be saved since; {checkpoints.kept()}"
    )
