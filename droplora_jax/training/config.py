"""How long to train, in what portions, and how often to evaluate, save and log."""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Literal

import jax

from droplora_jax.core.errors import InputError
from droplora_jax.core.sharding import RULES, axis_size
from droplora_jax.data.batches import Batches
from droplora_jax.nn.options import Remat


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


def total_steps(config: TrainConfig, batches: Batches) -> int:
    """The optimizer steps of a whole run."""
    return config.steps or batches.steps(config.epochs or 3.0)
