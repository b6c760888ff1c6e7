"""DropLoRA: a low-rank branch whose rank dimension is pruned at random while training."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, Literal

import jax.numpy as jnp
import optax
from flax import nnx
from jaxtyping import Array

from droplora_jax import lowrank
from droplora_jax.adapters import base
from droplora_jax.adapters.config import Branch, LowRank, option
from droplora_jax.adapters.low_rank import LowRankLinear
from droplora_jax.core.errors import InputError
from droplora_jax.core.schedules import Schedule, schedule
from droplora_jax.nn.layer_paths import Patterns
from droplora_jax.nn.linear_spec import LinearSpec
from droplora_jax.nn.mask_keys import DropShare, checked_rows


@dataclass(frozen=True)
class DropLoRA(LowRank):
    """What to adapt and how its ranks are dropped (arXiv 2508.17337; `drop_rate=0` is LoRA).

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
    """

    of_training = (
        *LowRank.of_training,
        "drop_rate",
        "drop_rate_pattern",
        "drop_schedule",
        "drop_warmup_steps",
        "granularity",
        "sampler",
        "rescale",
    )

    kind: Literal["droplora"] = "droplora"  # type: ignore[assignment]
    drop_rate: float = 0.5
    drop_rate_pattern: Mapping[str, float] = field(default_factory=dict)
    drop_schedule: Schedule = "constant"
    drop_warmup_steps: int = 0
    granularity: lowrank.Granularity = "token"
    sampler: lowrank.Sampler = "bernoulli"
    rescale: bool = True

    def __post_init__(self) -> None:
        super().__post_init__()
        for name, rate in {"": self.drop_rate, **self.drop_rate_pattern}.items():
            if not 0 <= rate < 1:
                raise InputError(
                    f"{option('drop_rate', name)}={rate}: must be at least 0 (plain LoRA) and "
                    "below 1 (1 would drop every rank)"
                )
        if self.drop_warmup_steps < 0:
            raise InputError(
                f"adapter.drop_warmup_steps={self.drop_warmup_steps}: must not be negative"
            )
        smallest = min([self.rank, *self.rank_pattern.values()])
        highest = max([self.drop_rate, *self.drop_rate_pattern.values()])
        if self.sampler == "exact" and lowrank.kept_ranks(smallest, highest) < 1:
            raise InputError(
                f"adapter.drop_rate={highest} with sampler 'exact' keeps no rank of "
                f"{smallest}: lower drop_rate or raise rank"
            )

    @property
    def scheduled(self) -> bool:
        """Whether the rates change over a run."""
        return self.drop_schedule != "constant" or self.drop_warmup_steps > 0

    def share(self, steps: int) -> optax.Schedule | None:
        if not self.scheduled:
            return None
        warmup, name = self.drop_warmup_steps, "adapter.drop_warmup_steps"
        return schedule(1.0, self.drop_schedule, warmup, steps, name=name)

    def linear(self) -> type[LowRankLinear]:
        return DropLoRALinear

    def branches(
        self, names: Sequence[tuple[str, ...]], chosen: Sequence[bool] | None = None
    ) -> tuple[Branch, ...]:
        rate_of = Patterns(self.drop_rate_pattern)
        return tuple(
            branch._replace(drop_rate=rate_of.of(layer, self.drop_rate) if branch.rank else 0.0)
            for layer, branch in zip(names, super().branches(names, chosen), strict=True)
        )


class DropLoRALinear(LowRankLinear):
    """`y = base(x) + scale * ((x @ A) * m) @ B`, with no mask while `mask_key` is empty."""

    def __init__(
        self,
        layer: nnx.Module,
        spec: LinearSpec,
        config: DropLoRA,
        branches: tuple[Branch, ...],
        key: base.InitKey,
    ) -> None:
        super().__init__(layer, spec, config, branches, key)
        drops = any(branch.drop_rate for branch in branches)
        self.mask_key = self.mask_key_of(config.granularity if drops else None)
        self.rates = self.per_layer([branch.drop_rate for branch in branches], "float32")
        counts = [lowrank.kept_ranks(branch.rank, branch.drop_rate) for branch in branches]
        self.most_kept = max(counts)
        self.counts = self.per_layer(counts, "int32") if config.sampler == "exact" else None
        stack = spec.stack(self.base_kernel.get_value())
        self.share = DropShare(jnp.ones(stack)) if drops and config.scheduled else None

    def _drop_rate(self) -> float | Array:
        """The rate of this layer in this step."""
        rate = self.branches[0].drop_rate if self.rates is None else self.rates[...]
        return rate if self.share is None else rate * self.share[...]

    def _kept(self) -> int | Array:
        """How many ranks `exact` keeps."""
        if self.share is not None:
            rank = jnp.asarray(self.own_rank(), jnp.float32)
            return jnp.round((1.0 - self._drop_rate()) * rank).astype(jnp.int32)
        return self.most_kept if self.counts is None else self.counts[...]

    def subspace(self, dtype: Any) -> tuple[Array, Array, Array | None]:
        config, keys = self.config, self.mask_key[...]
        a, b = self.lora_a[...], self.lora_b[...]
        of_step = (config.granularity, config.sampler) == ("step", "exact")
        if keys.size == 0 or not of_step or self.share is not None:
            return a, b, None
        index, mask = lowrank.subspace(
            keys,
            self.rank,
            self.most_kept,
            kept=self._kept(),
            drop_rate=self._drop_rate(),
            rescale=config.rescale,
            dtype=dtype,
            rank=self.own_rank(),
        )
        a = lowrank.take_ranks(a, index, axis=-1)
        return a, lowrank.take_ranks(b, index, axis=len(self.spec.batched)), mask

    def mask(self, h: Array) -> Array | None:
        config, keys = self.config, self.mask_key[...]
        if keys.size == 0:
            return None
        return lowrank.rank_mask(
            keys if config.granularity == "step" else checked_rows(keys, h),
            h.shape,
            drop_rate=self._drop_rate(),
            granularity=config.granularity,
            sampler=config.sampler,
            rescale=config.rescale,
            dtype=h.dtype,
            kept=self._kept(),
            rank=self.own_rank(),
        )
