"""DropLoRA: a low-rank branch whose rank dimension is pruned at random while training."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from functools import partial
from typing import Any, Literal, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx
from jaxtyping import Array

from droplora_jax import lowrank, prng
from droplora_jax.adapters import base, placing
from droplora_jax.adapters.targets import Path, Patterns, layer_names
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
        names of the linear layers (`layers.q_proj`; `layers.3.q_proj` is one of a stack); every
        one of them must match.
      exclude: patterns of layers that are left alone although they are targets.
      rank_stabilized: the branch is scaled by alpha / sqrt(rank) (arXiv 2312.03732).
      rank_pattern, alpha_pattern: other values by pattern; the first that matches counts.
      train_whole: patterns of parameters of the base that are trained too, such as `lm_head` or
        `bias$`, searched in their paths (`layers.q_proj.bias`).
    """

    kind: Literal["droplora"] = "droplora"
    rank: int = 32
    alpha: float = 64.0
    drop_rate: float = 0.5
    granularity: lowrank.Granularity = "token"
    sampler: lowrank.Sampler = "bernoulli"
    rescale: bool = True
    targets: str | tuple[str, ...] = "paper"
    exclude: tuple[str, ...] = ()
    rank_stabilized: bool = False
    rank_pattern: Mapping[str, int] = field(default_factory=dict)
    alpha_pattern: Mapping[str, float] = field(default_factory=dict)
    train_whole: tuple[str, ...] = ()

    def __post_init__(self) -> None:
        for name in ("rank_pattern", "alpha_pattern"):
            object.__setattr__(self, name, Patterns(getattr(self, name)))
        for name, rank in {"": self.rank, **self.rank_pattern}.items():
            if rank < 1:
                raise InputError(f"{_key('rank', name)}={rank}: must be at least 1")
        for name, alpha in {"": self.alpha, **self.alpha_pattern}.items():
            if not (alpha > 0 and math.isfinite(alpha)):
                raise InputError(f"{_key('alpha', name)}={alpha}: must be a positive number")
        if not 0 <= self.drop_rate < 1:
            raise InputError(
                f"adapter.drop_rate={self.drop_rate}: must be at least 0 (plain LoRA) and below 1 "
                "(1 would drop every rank)"
            )
        if not self.targets:
            raise InputError(
                f"adapter.targets={self.targets!r}: must name what to adapt, such as 'paper'"
            )
        smallest = min([self.rank, *self.rank_pattern.values()])
        if self.sampler == "exact" and lowrank.kept_ranks(smallest, self.drop_rate) < 1:
            raise InputError(
                f"adapter.drop_rate={self.drop_rate} with sampler 'exact' keeps no rank of "
                f"{smallest}: lower drop_rate or raise rank"
            )

    @property
    def patterns(self) -> dict[str, tuple[str, ...]]:
        return {name: tuple(getattr(self, name)) for name in ("rank_pattern", "alpha_pattern")}

    def adapt(
        self,
        layer: nnx.Module,
        spec: base.LinearSpec,
        path: Path,
        key: Array | None,
        chosen: Sequence[bool] | None = None,
    ) -> DropLoRALinear:
        names = layer_names(path, base.stack_of(layer))
        branches = self.branches(names, chosen)
        key = None if key is None else prng.fold_path(key, path)
        return self.linear()(layer, spec, self, branches, key)

    def linear(self) -> type[DropLoRALinear]:
        """The kind of layer that this configuration makes."""
        return DropLoRALinear

    def branches(
        self, names: Sequence[tuple[str, ...]], chosen: Sequence[bool] | None = None
    ) -> tuple[Branch, ...]:
        """Rank and scale of every layer of a stack; rank 0 of one that is not chosen."""
        rank_of, alpha_of = Patterns(self.rank_pattern), Patterns(self.alpha_pattern)
        branches = []
        for layer, there in zip(names, chosen or [True] * len(names), strict=True):
            rank = rank_of.of(layer, self.rank)
            alpha = float(alpha_of.of(layer, self.alpha))
            scale = alpha / (math.sqrt(rank) if self.rank_stabilized else rank)
            branches.append(Branch(rank, alpha, scale) if there else Branch(0, alpha, 0.0))
        return tuple(branches)


def _key(name: str, pattern: str) -> str:
    return f"adapter.{name}_pattern.{pattern}" if pattern else f"adapter.{name}"


class Branch(NamedTuple):
    """The branch beside one layer."""

    rank: int
    alpha: float
    scale: float


class PerLayer(nnx.Variable):
    """A number for every layer of a stack, [*stack], that runs through its scan with the layer."""


class DropLoRALinear(base.Adapter):
    """`y = base(x) + scale * ((x @ A) * m) @ B`, with no mask while `mask_key` is empty.

    A [*stack, *in, R] starts Kaiming-uniform as a PyTorch linear layer does, B [*stack, R, *out]
    at zero, so the model is unchanged at first. Both are float32 and lie as the kernel does. Where
    the layers of a stack differ in rank, R is the largest, and the factors are zero beyond a
    layer's own: so are their gradients.
    """

    def __init__(
        self,
        layer: nnx.Module,
        spec: base.LinearSpec,
        config: DropLoRA,
        branches: tuple[Branch, ...],
        key: Array | None,
    ) -> None:
        self.base = layer
        self.spec = spec
        self.config = config
        self.branches = branches
        kernel = self.kernel.get_value()  # an array, or only its shape and sharding
        stack = spec.stack(kernel)
        a_shape, b_shape = placing.factor_shapes(kernel, spec, self.rank)
        a_sharding, b_sharding = placing.factor_shardings(kernel, spec)
        place = partial(placing.place, abstract=key is None)
        key = prng.root_key(0) if key is None else key
        init_a = _kaiming_uniform(key, stack, a_shape[len(stack) :], len(spec.batched))
        self.lora_a = nnx.LoRAParam(place(lambda: init_a() * self._there(), a_sharding))
        self.lora_b = nnx.LoRAParam(place(lambda: jnp.zeros(b_shape), b_sharding))
        self.mask_key = base.MaskKey(
            jnp.broadcast_to(prng.root_key(0), (*stack, 0)),
            stack=stack,
            granularity=config.granularity if config.drop_rate > 0 else None,
        )
        # Only where they differ: a number in the program costs nothing.
        differ = len(set(branches)) > 1
        self.scales = (
            self._per_layer([b.scale for b in branches], "float32", place) if differ else None
        )
        self.ranks = self._per_layer([b.rank for b in branches], "int32", place) if differ else None

    def _per_layer(self, values: list[Any], dtype: str, place: Any) -> PerLayer:
        kernel = self.kernel.get_value()
        shape, sharding = self.spec.stack(kernel), placing.letters_sharding(kernel, self.spec, "")
        return PerLayer(place(lambda: jnp.asarray(values, dtype=dtype).reshape(shape), sharding))

    @property
    def rank(self) -> int:
        """R of the factors: the largest of the layers' ranks."""
        return max(branch.rank for branch in self.branches)

    @property
    def adapted(self) -> Sequence[bool]:
        return [branch.rank > 0 for branch in self.branches]

    def _there(self) -> Array:
        """1 for the ranks that a layer has, 0 for padding: [*stack, 1..., R]."""
        kernel = self.kernel.get_value()
        stack = self.spec.stack(kernel)
        ranks = np.reshape([b.rank for b in self.branches], (*stack, *[1] * len(self.spec.a)))
        return jnp.asarray(np.arange(self.rank) < ranks, jnp.float32)

    def _scale(self, index: tuple[Any, ...] = (), letters: str = "") -> float | Array:
        """The scale, to multiply what has `letters` after the axes of the stack."""
        if self.scales is None:
            return self.branches[0].scale
        scales = self.scales[index or ...]
        return scales.reshape(scales.shape + (1,) * len(letters))

    def __call__(self, x: Array, *args: Any, h: Array | None = None, **kwargs: Any) -> Array:
        """Apply the layer; `h` is `x @ A` where the caller has it (`shared.apply_all`)."""
        y = self.base(x, *args, **kwargs)
        return y + self.delta(x, y, h)

    def delta(self, x: Array, y: Array, h: Array | None) -> Array:
        """The branch beside `y = base(x)`, in its dtype."""
        a, b, mask = self._subspace(y.dtype)
        if h is None:
            x = self.spec.arrange(x).astype(y.dtype)
            (h,) = lowrank.compress(x, a, down=self.spec.down)
        if mask is None:
            mask = self._mask(h)
        return lowrank.lowrank_delta(h, b, scale=self._scale(), mask=mask, up=self.spec.up)

    @property
    def shared_factor(self) -> Array | None:
        """A [I, R] of a plain layer, whose product with the input can be made with others'.

        Or only the ranks that this step keeps, where they are the same for all positions.
        """
        return self._subspace(None)[0] if self.spec.down == "...i,ir->...r" else None

    def _subspace(self, dtype: Any) -> tuple[Array, Array, Array | None]:
        """The factors that the products need, and the mask of their ranks if that is known."""
        config, keys = self.config, self.mask_key[...]
        a, b = self.lora_a[...], self.lora_b[...]
        if keys.size == 0 or (config.granularity, config.sampler) != ("step", "exact"):
            return a, b, None
        index, mask = lowrank.subspace(
            keys,
            self.rank,
            drop_rate=config.drop_rate,
            rescale=config.rescale,
            dtype=dtype,
            rank=None if self.ranks is None else self.ranks[...],
        )
        a = lowrank.take_ranks(a, index, axis=-1)
        return a, lowrank.take_ranks(b, index, axis=len(self.spec.batched)), mask

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
            rank=None if self.ranks is None else self.ranks[...],
        )

    def merged_kernel(self, kernel: Array, index: tuple[Any, ...] = ()) -> Array:
        return lowrank.merged_kernel(
            kernel,
            self.lora_a[index or ...],
            self.lora_b[index or ...],
            scale=self._scale(index, self.spec.kernel),
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
