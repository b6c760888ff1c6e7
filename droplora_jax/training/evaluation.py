"""What a run is judged by while it goes on: the loss on validation rows, and tasks."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from contextlib import closing
from dataclasses import dataclass
from functools import partial
from typing import Any

import grain
import jax
import numpy as np
from flax import nnx
from jax.sharding import Mesh

from droplora_jax.core import distributed
from droplora_jax.core.errors import InputError
from droplora_jax.core.sharding import named_sharding
from droplora_jax.data.batches import Batches
from droplora_jax.data.device_feed import fed
from droplora_jax.inference.generator import Generator
from droplora_jax.inference.scoring import evaluate
from droplora_jax.inference.task import Example, Task
from droplora_jax.inference.tasks import TASKS
from droplora_jax.training.metrics_log import ACCURACY
from droplora_jax.training.step import eval_step

LOSS = "eval_loss"
Measure = Callable[[Any], dict[str, float]]  # adapters to numbers by name


@dataclass(frozen=True)
class Measured:
    """On what a run is evaluated, and in what its best checkpoint is best.

    Attributes:
      valid: the rows, for the loss.
      tasks: with the examples that are asked.
      tokenizer: of the model, for the tasks.
      rows: prompts at a time.
      run_code: whether a task may run what the model wrote.
      best: `eval_loss`, or the key of a task; None if there is nothing to evaluate.
    """

    valid: Batches | None = None
    tasks: tuple[tuple[Task, Sequence[Example]], ...] = ()
    tokenizer: Any = None
    rows: int = 8
    run_code: bool = False
    best: str | None = None

    def by(self, graphdef: Any, mask_keys: Any, frozen: Any, mesh: Mesh) -> Measure | None:
        """The numbers of a model's adapters, or None if there are none to find.

        `eval_loss` is the mean over all trained tokens of the validation rows.
        """
        if self.best is None:
            return None
        packed = self.valid is not None and self.valid.packed
        evaluated = partial(eval_step, graphdef, packed=packed)
        step = jax.jit(evaluated, out_shardings=named_sharding(mesh))

        def measure(adapters: Any) -> dict[str, float]:
            found = {}
            if self.valid is not None:
                run = partial(step, adapters, mask_keys, frozen)
                found[LOSS] = _mean_loss(run, self.valid, mesh)
            if self.tasks:
                found |= self._accuracies(nnx.merge(graphdef, adapters, mask_keys, frozen))
            # A program that ran into its time limit on one host may not have on another.
            return distributed.of_first(found)

        return measure

    def _accuracies(self, model: Any) -> dict[str, float]:
        complete = Generator(model, self.tokenizer, batch_size=self.rows)
        found = {}
        for task, examples in self.tasks:
            result = evaluate(
                task, examples, complete, batch_size=self.rows, run_code=self.run_code
            )
            assert result.accuracy is not None  # `tasks_of` takes no others
            found[key(task.name)] = result.accuracy
        return found

    def score(self, numbers: Mapping[str, float]) -> float:
        """The number of an evaluation that ranks checkpoints: higher for better adapters."""
        assert self.best is not None
        return -numbers[LOSS] if self.best == LOSS else numbers[self.best]


def key(task: str) -> str:
    """Of a task's accuracy in the log."""
    return f"{ACCURACY}{task}"


def tasks_of(
    files: Mapping[str, str], examples: int, run_code: bool
) -> tuple[tuple[Task, Sequence[Example]], ...]:
    """The tasks of `train.eval_tasks` with their first examples.

    Raises:
      InputError: a task that is not known, that only a judge can score, or that runs code while
        that is not allowed; a file that is not as the task needs it.
    """
    for name in files:
        where = f"train.eval_tasks.{name}"
        if name not in TASKS:
            raise InputError(f"{where}: must be one of {', '.join(TASKS)}")
        if TASKS[name].judged:
            raise InputError(f"{where}: has no right answers, only a judge can score it")
        if TASKS[name].runs_code and not run_code:
            raise InputError(
                f"{where}: runs code that the model writes; train.eval_run_code=true allows it"
            )
    return tuple((TASKS[name], TASKS[name].read(file)[:examples]) for name, file in files.items())


def best_key(best: str | None, valid: bool, tasks: Sequence[str]) -> str | None:
    """The key of the number by which a run's best checkpoint is chosen; see `train.best`.

    Raises:
      InputError: the run does not find that number.
    """
    known = [*(["loss"] if valid else []), *tasks]
    if best is not None and best not in known:
        rule = f"must be one of {', '.join(known)}" if known else "nothing is evaluated"
        raise InputError(
            f"train.best={best!r}: {rule} (data.valid, data.valid_fraction and train.eval_tasks)"
        )
    chosen = best or next(iter(known), None)
    return LOSS if chosen == "loss" else None if chosen is None else key(chosen)


def _mean_loss(step: Callable[[Any], Any], valid: Batches, mesh: Mesh) -> float:
    numbers = grain.MapDataset.source(valid.lines_once())
    with closing(fed(valid, numbers, mesh)) as batches:
        sums = [step(batch) for batch in batches]
    losses, counts = zip(*jax.device_get(sums), strict=True)
    return float(np.sum(losses, dtype=np.float64) / np.sum(counts))
