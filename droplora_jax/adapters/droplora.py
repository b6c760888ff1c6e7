"""DropLoRA: a low-rank branch whose rank dimension is pruned at random while training."""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Any, Literal

import jax
import jax.numpy as jnp
from flax import nnx
from jaxtyping import Array

from droplora_jax import lowrank, prng
from droplora_jax.adapters import base
from droplora_jax.errors import InputError


@dataclass(frozen=True)
class DropLoRA:
    """What to adapt and how its ranks are dropped (arXiv 2508.17337; `drop_rate=0` is LoRA).

    Attributes:
      rank: R, the width of the branch.
      alpha: the branch is scaled by alpha / rank.
      drop_rate: the probability in [0, 1) that a rank is dropped in training.
      granularity: one mask per `token` (as the authors' code), per `sequence`, or one per layer
        and `step` (as the paper's text).
      sampler: `bernoulli`, or `exact`: always round((1 - drop_rate) * rank) ranks kept.
      rescale: scale the kept ranks by 1 / (1 - drop_rate) in training.
      targets: `paper` (q, k, v, up, down), `all-linear`, or regular expressions searched in the
        dotted path of a linear layer; every one of them must match.
    """

    kind: Literal["droplora"] = "droplora"
    rank: int = 32
    alpha: float = 64.0
    drop_rate: float = 0.5
    granularity: lowrank.Granularity = "token"
    sampler: lowrank.Sampler = "bernoulli"
    rescale: bool = True
    targets: str | tuple[str, ...] = "paper"

    def __post_init__(self) -> None:
        if self.rank < 1:
            raise InputError(f"adapter.rank={self.rank}: must be at least 1")
        if not (self.alpha > 0 and math.isfinite(self.alpha)):
            raise InputError(f"adapter.alpha={self.alpha}: must be a positive number")
        if not 0 <= self.drop_rate < 1:
            raise InputError(
                f"adapter.drop_rate={self.drop_rate}: must be at least 0 (plain LoRA) and below 1 "
                "(1 would drop every rank)"
            )
        if not self.targets:
            raise InputError(
                f"adapter.targets={self.targets!r}: must name what to adapt, such as 'paper'"
            )
        if self.sampler == "exact" and lowrank.kept_ranks(self.rank, self.drop_rate) < 1:
            raise InputError(
                f"adapter.drop_rate={self.drop_rate} with sampler 'exact' keeps no rank of "
                f"{self.rank}: lower drop_rate or raise rank"
            )

    @property
    def scale(self) -> float:
        return self.alpha / self.rank

    def adapt(
        self, layer: nnx.Module, spec: base.LinearSpec, path: base.Path, key: Array
    ) -> DropLoRALinear:
        return DropLoRALinear(layer, spec, self, prng.fold_path(key, path))


class DropLoRALinear(base.Adapter):
    """`y = base(x) + scale * ((x @ A) * m) @ B`, with no mask while `mask_key` is empty.

    A [*stack, *in, R] starts Kaiming-uniform as a PyTorch linear layer does, B [*stack, R, *out]
    at zero, so the model is unchanged at first. Both are float32 and lie as the kernel does.
    """

    def __init__(
        self, layer: nnx.Module, spec: base.LinearSpec, config: DropLoRA, key: Array
    ) -> None:
        self.base = layer
        self.spec = spec
        self.config = config
        kernel = self.kernel.get_value()  # an array, or only its shape and sharding
        stack = spec.stack(kernel)
        a_shape, b_shape = base.factor_shapes(kernel, spec, config.rank)
        a_sharding, b_sharding = base.factor_shardings(kernel, spec)
        init_a = _kaiming_uniform(key, stack, a_shape[len(stack) :], len(spec.batched))
        self.lora_a = nnx.LoRAParam(base.place(init_a, a_sharding))
        self.lora_b = nnx.LoRAParam(base.place(lambda: jnp.zeros(b_shape), b_sharding))
        self.mask_key = base.MaskKey(
            jnp.broadcast_to(prng.root_key(0), (*stack, 0)),
            stack=stack,
            granularity=config.granularity if config.drop_rate > 0 else None,
        )

    def __call__(self, x: Array, *args: Any, h: Array | None = None, **kwargs: Any) -> Array:
        """Apply the layer; `h` is `x @ A` where the caller has it (`shared.apply_all`)."""
        y = self.base(x, *args, **kwargs)
        if h is None:
            x = self.spec.arrange(x).astype(y.dtype)
            (h,) = lowrank.compress(x, self.lora_a[...], down=self.spec.down)
        delta = lowrank.lowrank_delta(
            h, self.lora_b[...], scale=self.config.scale, mask=self._mask(h), up=self.spec.up
        )
        return y + delta

    @property
    def shared_factor(self) -> Array | None:
        """A [I, R] of a plain layer, whose product with the input can be made with others'."""
        return self.lora_a[...] if self.spec.down == "...i,ir->...r" else None

    def _mask(self, h: Array) -> Array | None:
        keys = self.mask_key[...]
        if keys.size == 0:
            return None
        config = self.config
        rows = h.shape[0]
        if config.granularity != "step" and keys.shape[0] != rows:
            raise InputError(
                f"the masks were drawn for {keys.shape[0]} rows, but this layer sees {rows}: "
                "pass draw(rows=...) one index for every row of the batch"
            )
        return lowrank.rank_mask(
            keys,
            h.shape,
            drop_rate=config.drop_rate,
            granularity=config.granularity,
            sampler=config.sampler,
            rescale=config.rescale,
            dtype=h.dtype,
        )

    def merged_kernel(self, kernel: Array, index: tuple[Any, ...] = ()) -> Array:
        return lowrank.merged_kernel(
            kernel,
            self.lora_a[index or ...],
            self.lora_b[index or ...],
            scale=self.config.scale,
            product=self.spec.product,
        )


def _kaiming_uniform(key: Array, stack: tuple[int, ...], shape: tuple[int, ...], batched: int):
    """Uniform in +-1 / sqrt(fan_in), which is He's bound with a = sqrt(5); a key a layer."""
    bound = 1.0 / math.sqrt(math.prod(shape[batched:-1]))

    def make() -> Array:
        def sample(key: Array) -> Array:
            return jax.random.uniform(key, shape, jnp.float32, -bound, bound)

        for _ in stack:
            sample = jax.vmap(sample)
        return sample(prng.fold_stack(key, stack))

    return make
