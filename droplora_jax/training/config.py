"""Options of training: how long, in what batches, how often to look, and the optimizer."""

from __future__ import annotations

import math
import re
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field
from typing import Literal

from droplora_jax.core.config import Schedule
from droplora_jax.core.errors import raise_all
from droplora_jax.nn.options import Remat


@dataclass(frozen=True)
class TrainConfig:
    """How long to train, in what batches, and how often to evaluate, save and log.

    Attributes:
      steps: optimizer steps; instead of `epochs`.
      epochs: passes over the training examples; 3 if `steps` is not given either.
      global_batch: sequences of one optimizer step, over all devices. A sequence holds one example,
        or, with packing, several.
      micro_batch: sequences of one forward and backward pass, over all devices; the gradients of
        the passes are summed. Default: the whole batch at once.
      eval_every: steps between evaluations, on `data.valid` and `eval_tasks`.
      eval_tasks: files by the name of a task whose accuracy is measured too, such as
        `{gsm8k: gsm8k_test.jsonl}`.
      eval_examples: how many examples of each file are used, from its beginning.
      eval_run_code: lets `humaneval` and `mbpp` run the code that the model writes.
      best: the number that the best checkpoint is best in: `loss`, or the name of a task. Default:
        the loss if there are validation examples, else the first task.
      save_every: steps between checkpoints.
      log_every: steps between rows of metrics.jsonl.
      keep: how many of the newest checkpoints to keep, beside the best.
      stop_seconds: how long a run may take to save after SIGTERM (a preemption); then it ends.
      remat: what a layer saves for its backward pass: `everything`; `dots`, without what is cheap
        to compute again; `offload`, the same in the host's memory (not on a CPU); `attention`, its
        output alone; or `nothing`. `auto`: the first of `dots`, `attention` and `nothing` that fits
        by the compiler's word; the run says which and why.
      neftune_alpha: NEFTune (arXiv 2310.05914): in training, noise on the embedded tokens, uniform
        in +-alpha / sqrt(L D), L the length of the token's own document and D the model's width;
        0 for none. The paper's values are 5 to 15.
      profile_steps: the first and the last step to trace, such as `[3, 5]`, into `profile/` of the
        run's folder.
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
        raise_all(self._problems())

    def _problems(self) -> Iterator[str]:
        counts = ("steps", "global_batch", "micro_batch", "eval_every", "save_every")
        for name in (*counts, "log_every", "keep", "stop_seconds", "eval_examples"):
            value = getattr(self, name)
            if value is not None and value < 1:
                yield f"{name}={value}: must be at least 1"
        if not 0 <= self.neftune_alpha < math.inf:
            yield f"neftune_alpha={self.neftune_alpha}: must be 0 or more"
        if self.epochs is not None and not (self.epochs > 0 and math.isfinite(self.epochs)):
            yield f"epochs={self.epochs}: must be positive"
        if self.steps is not None and self.epochs is not None:
            yield "steps and epochs are both given: give one of them"
        if (steps := self.profile_steps) is not None and not (
            len(steps) == 2 and 1 <= steps[0] <= steps[1]
        ):
            yield (
                f"profile_steps={list(steps)}: must be the first and the last step to trace, "
                "counted from 1, such as [3, 5]"
            )
        if self.rows_per_pass > 0 and self.global_batch % self.rows_per_pass:
            yield (
                f"global_batch={self.global_batch} is not divisible by "
                f"micro_batch={self.micro_batch}"
            )

    @property
    def rows_per_pass(self) -> int:
        """The rows of one forward and backward pass."""
        return self.global_batch if self.micro_batch is None else self.micro_batch


@dataclass(frozen=True)
class OptimConfig:
    """The optimizer; the defaults are the recipe behind the published numbers.

    Attributes:
      name: any optimizer of optax that takes a learning rate, such as `adamw`, `lion`, `sgd`.
      learning_rate: its highest value.
      schedule: what follows the warm-up: `constant`, or down to zero by `linear` or `cosine`.
      warmup_steps: steps in which the learning rate rises from zero; fewer than the run has.
      weight_decay: passed to optimizers that have it; must be 0 for others.
      no_decay: patterns of what is not decayed, searched in the paths of what is trained
        (`layers.q_proj.lora_b`).
      b_ratio: the learning rate of every B is so many times that of the rest (LoRA+, arXiv
        2402.12354, which takes 16).
      clip_norm: gradients are scaled down to this global norm; null for no clipping.
      options: further arguments of the optimizer, such as `{b2: 0.95}`. `{mu_dtype: bfloat16}`
        halves the first moment of Adam and Lion (optax has no low precision for the second, and no
        8 bits).
    """

    name: str = "adamw"
    learning_rate: float = 3e-4
    schedule: Schedule = "linear"
    warmup_steps: int = 100
    weight_decay: float = 0.1
    no_decay: tuple[str, ...] = ()
    b_ratio: float = 1.0
    clip_norm: float | None = 1.0
    options: dict[str, float | bool | str] = field(default_factory=dict)

    def __post_init__(self) -> None:
        raise_all(self._problems())

    def _problems(self) -> Iterator[str]:
        if not (self.learning_rate > 0 and math.isfinite(self.learning_rate)):
            yield f"learning_rate={self.learning_rate}: must be positive"
        if self.warmup_steps < 0:
            yield f"warmup_steps={self.warmup_steps}: must not be negative"
        if not (self.weight_decay >= 0 and math.isfinite(self.weight_decay)):
            yield f"weight_decay={self.weight_decay}: must not be negative"
        if not (self.b_ratio > 0 and math.isfinite(self.b_ratio)):
            yield f"b_ratio={self.b_ratio}: must be positive; 1 for no difference"
        for pattern in self.no_decay:
            try:
                re.compile(pattern)
            except re.error as error:
                yield f"no_decay={pattern!r}: not a regular expression ({error})"
        if self.clip_norm is not None and not self.clip_norm > 0:
            yield f"clip_norm={self.clip_norm}: must be positive, or null"
