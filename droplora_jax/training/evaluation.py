"""Evaluation while a run trains: the loss on validation examples, and the accuracy of tasks."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from contextlib import closing
from dataclasses import dataclass, replace
from functools import partial
from typing import Any

import jax
import numpy as np
from flax import nnx
from jax.sharding import Mesh

from droplora_jax.core import distributed
from droplora_jax.core.errors import InputError
from droplora_jax.core.sharding import named_sharding
from droplora_jax.data.batches import Batches
from droplora_jax.data.device_feed import feed, once
from droplora_jax.data.templates.base import Document, Piece, Tokenizer
from droplora_jax.data.tokenization import encode_prompts
from droplora_jax.inference.generator import Generator, check_prompt
from droplora_jax.inference.scoring import evaluate, sampling_of
from droplora_jax.inference.task import Example, Task
from droplora_jax.inference.tasks import TASKS
from droplora_jax.models.config import ModelConfig
from droplora_jax.models.decoder import Decoder
from droplora_jax.nn.options import StepOptions
from droplora_jax.training.metrics_log import ACCURACY, UNREAD
from droplora_jax.training.step import eval_step

LOSS = "eval_loss"
Evaluate = Callable[[nnx.State], dict[str, float]]  # adapters to numbers by name
# A batch to the sum of the losses of its trained tokens, and their number.
LossSum = Callable[[Mapping[str, jax.Array]], tuple[jax.Array, jax.Array]]


@dataclass(frozen=True)
class Evaluation:
    """What a run is evaluated on, and which number ranks its checkpoints.

    Attributes:
      valid: the validation examples, for the loss.
      tasks: each task with its examples.
      tokenizer: the model's, for the tasks.
      batch_size: prompts that are completed at a time.
      run_code: whether a task may run what the model wrote.
      best: `eval_loss`, or the key of a task; None if there is nothing to evaluate.
    """

    valid: Batches | None = None
    tasks: tuple[tuple[Task, Sequence[Example]], ...] = ()
    tokenizer: Any = None
    batch_size: int = 8
    run_code: bool = False
    best: str | None = None

    def function(
        self,
        graphdef: nnx.GraphDef[Decoder],
        mask_keys: nnx.State,
        frozen: nnx.State,
        mesh: Mesh,
        options: StepOptions = StepOptions(),
    ) -> Evaluate | None:
        """The function from a model's adapters to its numbers; None without anything to evaluate.

        `eval_loss` is the mean over all trained tokens of the validation rows.
        """
        if self.best is None:
            return None
        packed = self.valid is not None and self.valid.packed
        evaluated = partial(eval_step, graphdef, options=replace(options, packed=packed))
        step = jax.jit(evaluated, out_shardings=named_sharding(mesh))

        def evaluate_adapters(adapters: nnx.State) -> dict[str, float]:
            numbers = {}
            if self.valid is not None:
                run = partial(step, adapters, mask_keys, frozen)
                numbers[LOSS] = _mean_loss(run, self.valid, mesh)
            if self.tasks:
                numbers |= self._accuracies(
                    nnx.merge(graphdef, adapters, mask_keys, frozen), options
                )
            # Code that ran into its time limit on one host may have ended in time on another.
            return distributed.of_first(numbers)

        return evaluate_adapters

    def _accuracies(self, model: Decoder, options: StepOptions) -> dict[str, float]:
        complete = Generator(model, self.tokenizer, batch_size=self.batch_size, options=options)
        accuracies = {}
        for task, examples in self.tasks:
            result = evaluate(
                task, examples, complete, batch_size=self.batch_size, run_code=self.run_code
            )
            assert result.accuracy is not None  # `tasks_of` takes no others
            accuracies[key(task.name)] = result.accuracy
            accuracies[f"{UNREAD}{task.name}"] = float(result.unread)
        return accuracies

    def score(self, numbers: Mapping[str, float]) -> float:
        """The number of an evaluation that ranks checkpoints: higher for better adapters."""
        assert self.best is not None
        return -numbers[LOSS] if self.best == LOSS else numbers[self.best]


def key(task: str) -> str:
    """The key of a task's accuracy in the log."""
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


def check_prompts(
    tasks: Sequence[tuple[Task, Sequence[Example]]], tokenizer: Tokenizer, shape: ModelConfig
) -> None:
    """Raise InputError for an example of a task that the model has too few positions to answer."""
    for task, examples in tasks:
        prompts = [Document((Piece(task.prompt(example, ()), False),)) for example in examples]
        for example, ids in zip(examples, encode_prompts(prompts, tokenizer), strict=True):
            where = f"train.eval_tasks.{task.name}: example {example['id']}"
            check_prompt(where, ids, sampling_of(task), shape)


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


def _mean_loss(step: LossSum, valid: Batches, mesh: Mesh) -> float:
    """Mean loss of all trained tokens of the validation examples."""
    sums: list[tuple[jax.Array, jax.Array]] = []
    with closing(feed(valid, once(valid), mesh)) as batches:
        for batch in batches:
            sums.append(step(batch))
            # Two at a time: more would hold their batches in memory, and devices of one host that
            # wait for each other's messages may take all of its threads.
            jax.block_until_ready(sums[-2:][0])
    losses, counts = zip(*jax.device_get(sums), strict=True)
    return float(np.sum(losses, dtype=np.float64) / np.sum(counts))
