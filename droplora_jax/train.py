"""The loop: data in, steps, guard, evaluation, checkpoints, and what a person sees."""

from __future__ import annotations

import math
import signal
import time
from collections.abc import Mapping
from concurrent.futures import Future
from contextlib import closing
from dataclasses import dataclass, field, replace
from functools import partial
from pathlib import Path
from typing import Any, Literal

import grain
import jax
from flax import nnx
from rich.console import Console

from droplora_jax import display, optim, prng, processes, signals
from droplora_jax.checkpoint import Checkpoints
from droplora_jax.data import Batches, fed
from droplora_jax.errors import InputError
from droplora_jax.metrics import MetricsLog, NoLog
from droplora_jax.models import Decoder, Remat
from droplora_jax.profiling import Profile
from droplora_jax.program import Program
from droplora_jax.sharding import RULES, axis_size
from droplora_jax.step import TrainState, init_state
from droplora_jax.surgery import initial_of, split
from droplora_jax.validation import Measure, Measured
from droplora_jax.watch import NonFinite, Watch


@dataclass(frozen=True)
class TrainConfig:
    """How long, in what portions, and how often to look.

    Attributes:
      steps: optimizer steps; or
      epochs: passes over the training rows (3 if neither is given).
      global_batch: rows (lines, with packing) of one optimizer step, over all devices.
      micro_batch: rows of one forward and backward pass, over all devices; the gradients of the
        passes are summed. Default: the whole batch at once.
      eval_every: steps between evaluations, on `data.valid` and `eval_tasks`.
      eval_tasks: files by the name of a task (`evaluate.TASKS`) whose accuracy is looked at too.
      eval_examples: of each of them, the first so many.
      eval_run_code: whether tasks that run code which the model wrote may do so.
      best: what the best checkpoint is best in: `loss`, or the name of a task. Default: the loss
        if there are validation rows, else the first task.
      save_every: steps between checkpoints.
      log_every: steps between rows of metrics.jsonl.
      keep: how many of the newest checkpoints to keep, beside the best.
      stop_seconds: how long a run may take to save after SIGTERM (a preemption); then it ends.
      remat: what a layer saves for its backward pass: `everything`; `dots`, without what is cheap
        to find again; `offload`, the same in the host's memory; `attention`, its output alone; or
        `nothing`. `auto`: the first of `dots`, `attention` and `nothing` that fits.
      neftune_alpha: NEFTune (arXiv 2310.05914): noise on the vectors of the tokens, uniform in
        +-alpha / sqrt(length of the row or document * model width); 0 for none.
      profile_steps: the first and the last step to trace, into `profile/` of the run's folder.
    """

    steps: int | None = None
    epochs: float | None = None
    global_batch: int = 128
    micro_batch: int | None = None
    eval_every: int = 100
    eval_tasks: Mapping[str, str] = field(default_factory=dict)
    eval_examples: int = 200
    eval_run_code: bool = False
    best: str | None = None
    save_every: int = 100
    log_every: int = 10
    keep: int = 2
    stop_seconds: int = 60
    remat: Remat | Literal["auto"] = "nothing"
    neftune_alpha: float = 0.0
    profile_steps: tuple[int, ...] | None = None

    def __post_init__(self) -> None:
        for name in ("steps", "global_batch", "micro_batch", "eval_every", "save_every"):
            value = getattr(self, name)
            if value is not None and value < 1:
                raise InputError(f"train.{name}={value}: must be at least 1")
        for name in ("log_every", "keep", "stop_seconds", "eval_examples"):
            if getattr(self, name) < 1:
                raise InputError(f"train.{name}={getattr(self, name)}: must be at least 1")
        if not 0 <= self.neftune_alpha < math.inf:
            raise InputError(f"train.neftune_alpha={self.neftune_alpha}: must be 0 or more")
        if self.epochs is not None and not (self.epochs > 0 and math.isfinite(self.epochs)):
            raise InputError(f"train.epochs={self.epochs}: must be positive")
        if self.steps is not None and self.epochs is not None:
            raise InputError("train.steps and train.epochs are both given: give one of them")
        if (steps := self.profile_steps) is not None and not (
            len(steps) == 2 and 1 <= steps[0] <= steps[1]
        ):
            raise InputError(
                f"train.profile_steps={list(steps)}: must be the first and the last step to trace, "
                "counted from 1, such as [3, 5]"
            )
        if self.global_batch % self.rows_per_pass:
            raise InputError(
                f"train.global_batch={self.global_batch} is not divisible by "
                f"train.micro_batch={self.micro_batch}"
            )

    @property
    def rows_per_pass(self) -> int:
        return self.micro_batch or self.global_batch

    def check_mesh(self, mesh: jax.sharding.Mesh, length: int) -> None:
        """Raise InputError unless every device gets the same rows and positions of `length`.

        And for `remat=offload` where there is nowhere to offload to.
        """
        if self.remat == "offload" and mesh.devices.flat[0].platform == "cpu":
            raise InputError(
                "train.remat='offload': a CPU has no memory beside the host's; take 'dots', or an "
                "accelerator"
            )
        parts = axis_size(mesh, RULES["batch"] or ())
        if self.rows_per_pass % parts:
            name = "micro_batch" if self.micro_batch else "global_batch"
            raise InputError(
                f"train.{name}={self.rows_per_pass} is not divisible by the {parts} parts that the "
                f"mesh splits rows into (replica x data x fsdp); make it a multiple of {parts}, or "
                "change the mesh"
            )
        if length % (parts := mesh.shape["context"] ** 2):
            raise InputError(
                f"data.max_length={length} is not divisible by {parts}, the square of "
                f"mesh.context={mesh.shape['context']} (each of so many devices attends with a "
                f"part of every other's positions); make it a multiple of {parts}"
            )


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
    optim: optim.OptimConfig
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
        self.schedule = optim.learning_rate(self.optim, self.steps)
        self.mask_root = prng.fold_name(prng.root_key(self.seed), "mask")

    def feed(self, start: int) -> grain.DatasetIterator[Any]:
        """The global batches from step `start` on, on the mesh, as microbatches [k, m, T]."""
        numbers = self.train.numbers[: self.steps]
        split = numbers.map(lambda lines: lines.reshape(-1, self.config.rows_per_pass))
        return fed(self.train, split, self.mesh, start=start)

    def profile(self) -> Profile:
        """Traces `train.profile_steps`; of several processes the first one does."""
        first, last = self.config.profile_steps or (0, 0)  # there is no step 0
        if not processes.first():
            first = last = 0
        return Profile(self.folder / "profile", first, last, partial(display.say, self.console))


def total_steps(config: TrainConfig, batches: Batches) -> int:
    """The optimizer steps of a whole run."""
    return config.steps or batches.steps(config.epochs or 3.0)


def train(run: Run) -> Decoder:
    """Train from the newest checkpoint, or from the start, to the last step.

    Raises:
      NonFinite: a loss, a gradient, an evaluation or the state is not finite; it was not saved.
      Stopped: SIGINT or SIGTERM; the state was saved.
      InputError: a file could not be written.
    """
    graphdef, adapters, mask_keys, frozen = split(run.model)
    tx = optim.optimizer(run.optim, run.schedule)
    checkpoints = Checkpoints(run.folder / "checkpoints", keep=run.config.keep)
    fresh = replace(init_state(adapters, tx), initial=initial_of(frozen))
    saved = checkpoints.restore_newest(fresh, partial(display.say, run.console))
    state, frozen = replace(saved, initial=None), nnx.merge_state(frozen, saved.initial)
    measure = run.measured.by(graphdef, mask_keys, frozen, run.mesh)
    start = int(state.step)
    log = MetricsLog(run.folder, step=start) if processes.first() else NoLog()
    agreed = processes.Agreement(run.mesh)
    try:
        program = run.program.result()
        if program.why:
            display.say(run.console, program.why)
        with (
            signals.collected(run.config.stop_seconds, partial(_late, run, checkpoints)) as stop,
            display.progress(run.console, start=start, total=run.steps) as show,
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
                    display.say(run.console, _start_up(run, program))
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
