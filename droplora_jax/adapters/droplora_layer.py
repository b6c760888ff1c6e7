"""The layer of DropLoRA: a branch whose rank dimension is pruned at random while training."""

from __future__ import annotations

import jax.numpy as jnp
from flax import nnx
from jax.typing import DTypeLike
from jaxtyping import Array

from droplora_jax import lowrank
from droplora_jax.adapters import base
from droplora_jax.adapters.config import Branch
from droplora_jax.adapters.droplora import DropLoRA
from droplora_jax.adapters.low_rank_layer import LowRankLinear
from droplora_jax.core.mask_options import kept_ranks
from droplora_jax.nn.branches import ActiveFactors
from droplora_jax.nn.linear_spec import LinearSpec
from droplora_jax.nn.mask_keys import DropShare, checked_rows


class DropLoRALinear(LowRankLinear):
    """`y = base(x) + scale * ((x @ A) * m) @ B`, with no mask while `mask_key` is empty."""

    config: DropLoRA

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
        counts = [kept_ranks(branch.rank, branch.drop_rate) for branch in branches]
        self.most_kept = max(counts)
        self.counts = self.per_layer(counts, "int32") if config.sampler == "exact" else None
        self.share = DropShare(jnp.ones(self.stack)) if drops and config.scheduled else None

    def _drop_rate(self) -> float | Array:
        """The rate of this layer in this step."""
        rate = self.branches[0].drop_rate if self.rates is None else self.rates[...]
        return rate if self.share is None else rate * self.share[...]

    def _kept(self) -> int | Array:
        """How many ranks `exact` keeps."""
        if self.share is not None:
            rank = jnp.asarray(self.layer_rank(), jnp.float32)
            return jnp.round((1.0 - self._drop_rate()) * rank).astype(jnp.int32)
        return self.most_kept if self.counts is None else self.counts[...]

    def subspace(self, dtype: DTypeLike) -> ActiveFactors:
        config, keys = self.config, self.mask_key[...]
        a, b = self.lora_a[...], self.lora_b[...]
        of_step = (config.granularity, config.sampler) == ("step", "exact")
        if keys.size == 0 or not of_step or self.share is not None:
            return ActiveFactors(a, b, None)
        index, mask = lowrank.subspace(
            keys,
            self.rank,
            self.most_kept,
            kept=self._kept(),
            drop_rate=self._drop_rate(),
            rescale=config.rescale,
            dtype=dtype,
            rank=self.layer_rank(),
        )
        a = lowrank.take_ranks(a, index, axis=-1)
        b = lowrank.take_ranks(b, index, axis=len(self.spec.batched))
        return ActiveFactors(a, b, mask)

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
            rank=self.layer_rank(),
        )
