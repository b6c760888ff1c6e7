"""The options of DropLoRA: how the ranks of a branch are dropped while training."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from typing import ClassVar, Literal

from droplora_jax.adapters.config import Branch, LowRank, Share
from droplora_jax.core.config import Schedule
from droplora_jax.core.mask_options import Granularity, Sampler, kept_ranks
from droplora_jax.nn.layer_paths import Patterns


@dataclass(frozen=True)
class DropLoRA(LowRank):
    """What to adapt and how its ranks are dropped (arXiv 2508.17337; `drop_rate=0` is LoRA).

    >>> import droplora_jax as dl
    >>> config = dl.DropLoRA(rank=8, alpha=16.0, targets=("q_proj", "v_proj"), drop_rate=0.3)
    >>> config.granularity, config.sampler
    ('token', 'bernoulli')
    >>> dl.DropLoRA(rank=0, drop_rate=1.0)
    Traceback (most recent call last):
    ...
    droplora_jax.core.errors.InputError: rank=0: must be at least 1
    drop_rate=1.0: must be at least 0 (plain LoRA) and below 1 (1 would drop every rank)

    Attributes, beside those of `LowRank`:
      drop_rate: the probability in [0, 1) that a rank is dropped in training.
      drop_rate_pattern: other values by pattern; the first that matches counts.
      drop_schedule: how the rates go on over a run: `constant`, or down to zero by `linear` or
        `cosine`.
      drop_warmup_steps: steps in which the rates rise from zero before that.
      granularity: one mask per `token` (as the authors' code), per `sequence`, or one per layer
        and `step` (as the paper's text).
      sampler: `bernoulli`, or `exact`: always round((1 - drop_rate) * rank) ranks kept.
      rescale: scale the kept ranks by 1 / (1 - drop_rate) in training.

    Raises:
      InputError: impossible options; all of them are named.
    """

    of_training: ClassVar[tuple[str, ...]] = (
        *LowRank.of_training,
        "drop_rate",
        "drop_rate_pattern",
        "drop_schedule",
        "drop_warmup_steps",
        "granularity",
        "sampler",
        "rescale",
    )
    layer: ClassVar[str] = "droplora_jax.adapters.droplora_layer:DropLoRALinear"

    kind: Literal["droplora"] = "droplora"  # type: ignore[assignment]
    drop_rate: float = 0.5
    drop_rate_pattern: Mapping[str, float] = field(default_factory=dict)
    drop_schedule: Schedule = "constant"
    drop_warmup_steps: int = 0
    granularity: Granularity = "token"
    sampler: Sampler = "bernoulli"
    rescale: bool = True

    def _problems(self) -> Iterator[str]:
        yield from super()._problems()
        rates = dict(self._values("drop_rate"))
        wrong = {key: rate for key, rate in rates.items() if not 0 <= rate < 1}
        for key, rate in wrong.items():
            yield (
                f"{key}={rate}: must be at least 0 (plain LoRA) and below 1 (1 would drop every "
                "rank)"
            )
        if self.drop_warmup_steps < 0:
            yield f"drop_warmup_steps={self.drop_warmup_steps}: must not be negative"
        smallest = min([self.rank, *self.rank_pattern.values()])
        highest = max(rates.values())
        possible = smallest > 0 and not wrong
        if self.sampler == "exact" and possible and kept_ranks(smallest, highest) < 1:
            yield (
                f"drop_rate={highest} with sampler 'exact' keeps no rank of {smallest}: lower "
                "drop_rate or raise rank"
            )

    @property
    def scheduled(self) -> bool:
        """Whether the rates change over a run."""
        return self.drop_schedule != "constant" or self.drop_warmup_steps > 0

    def share(self, steps: int) -> Share | None:
        if not self.scheduled:
            return None
        from droplora_jax.core.schedules import schedule  # imports optax

        name = "drop_warmup_steps"
        return schedule(1.0, self.drop_schedule, self.drop_warmup_steps, steps, name=name)

    def branches(
        self, names: Sequence[tuple[str, ...]], chosen: Sequence[bool] | None = None
    ) -> tuple[Branch, ...]:
        rate_of = Patterns(self.drop_rate_pattern)
        return tuple(
            branch._replace(drop_rate=rate_of.of(layer, self.drop_rate) if branch.rank else 0.0)
            for layer, branch in zip(names, super().branches(names, chosen), strict=True)
        )
