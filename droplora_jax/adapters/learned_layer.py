"""The layer of learned masks: which ranks a branch keeps is trained with it."""

from __future__ import annotations

from collections.abc import Mapping

import jax.numpy as jnp
from flax import nnx
from jaxtyping import Array, Float

from droplora_jax import lowrank
from droplora_jax.adapters import base, layout
from droplora_jax.adapters.config import Branch
from droplora_jax.adapters.learned import Learned
from droplora_jax.adapters.low_rank_layer import LowRankLinear
from droplora_jax.nn.linear_spec import LinearSpec


class LearnedLinear(LowRankLinear):
    """`y = base(x) + scale * ((x @ A) * m) @ B`, m from `mask_logits` [*stack, R].

    Straight-through: the threshold of the logits is differentiated as the sigmoid; see
    `lowrank.learned_mask`.
    """

    def __init__(
        self,
        layer: nnx.Module,
        spec: LinearSpec,
        config: Learned,
        branches: tuple[Branch, ...],
        key: base.InitKey,
    ) -> None:
        super().__init__(layer, spec, config, branches, key)
        kernel = self.base_kernel.get_value()
        shape = (*spec.stack(kernel), self.rank)
        sharding = layout.letters_sharding(kernel, spec, spec.rank)
        self.mask_logits = nnx.LoRAParam(
            layout.place(layout.full, (shape, 0.0), sharding, abstract=self.abstract)
        )

    def mask(self, h: Array) -> Array:
        ranks = None if self.ranks is None else self.ranks[...]
        return lowrank.learned_mask(self.mask_logits[...], ranks)

    def fill(self, stored: Mapping[str, Array]) -> None:
        """As `LowRankLinear.fill`, with every rank kept: ranks that were dropped are zero in B."""
        super().fill(stored)
        self.mask_logits = nnx.LoRAParam(jnp.zeros_like(self.mask_logits[...]))

    def evaluated_b(self, index: base.Index = ()) -> Float[Array, "..."]:
        """B with the mask in it, so that any tool for LoRA computes the same."""
        b = super().evaluated_b(index)
        ranks = None if self.ranks is None else self.ranks[index or ...]
        mask = lowrank.learned_mask(self.mask_logits[index or ...], ranks)
        letters = self.spec.b
        return jnp.einsum(f"...{letters},...{self.spec.rank}->...{letters}", b, mask)
