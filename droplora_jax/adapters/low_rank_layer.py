"""A low-rank branch beside a linear layer: what all kinds of adapter have in common."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from functools import partial
from typing import Protocol, cast

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx
from jax.typing import DTypeLike
from jaxtyping import Array

from droplora_jax import lowrank
from droplora_jax.adapters import base, initializers, layout
from droplora_jax.adapters.config import FROM_KERNEL, Branch, LowRank
from droplora_jax.core import prng
from droplora_jax.nn import ops
from droplora_jax.nn.branches import ActiveFactors
from droplora_jax.nn.layer_paths import Path, layer_names
from droplora_jax.nn.linear_spec import LinearSpec, linear_spec, stack_of
from droplora_jax.nn.mask_keys import MaskKey, checked_rows

Factor = Array | jax.ShapeDtypeStruct


class Transposable(Protocol):
    """An embedding that is also the head: its transpose is a linear layer."""

    def transposed(self) -> nnx.Module: ...


class PerLayer(nnx.Variable):
    """A number for every layer of a stack, [*stack], which a scan slices with the layer."""


class Initial(nnx.Variable):
    """A frozen initial factor (A0 or B0) of a branch whose initial product is subtracted.

    Only PiSSA, MiLoRA and OLoRA have one, so that the model starts unchanged.
    """


class LowRankLinear(base.Adapter):
    """`y = base(x) + scale * (((x @ A) * m) @ B - (x @ A0) @ B0)`: kinds differ in the mask m.

    A [*stack, *in, R] and B [*stack, R, *out] are float32 and sharded as the kernel is. A0 and B0
    are their initial values, and exist only where these are a part of the kernel (`Initial`). If
    the layers of a stack differ in rank, R is the largest; beyond a layer's rank its factors and
    their gradients are zero.
    """

    def __init__(
        self,
        layer: nnx.Module,
        spec: LinearSpec,
        config: LowRank,
        branches: tuple[Branch, ...],
        key: base.InitKey,
    ) -> None:
        self.base = layer
        self.spec = spec
        self.config = config
        self.branches = branches
        self.abstract = key is None
        self.scales = self.per_layer([b.scale for b in branches], "float32")
        self.ranks = self.per_layer([b.rank for b in branches], "int32")
        a, b = self._first_factors(key)
        self.lora_a, self.lora_b = nnx.LoRAParam(cast(Array, a)), nnx.LoRAParam(cast(Array, b))
        subtracts = config.init in FROM_KERNEL
        self.first_a = self._initial(a) if subtracts else None
        self.first_b = self._initial(b) if subtracts else None
        self.input_key = self.mask_key_of("token") if config.input_dropout else None

    @classmethod
    def beside(
        cls,
        layer: nnx.Module,
        spec: LinearSpec,
        config: LowRank,
        path: Path,
        key: base.InitKey,
        chosen: Sequence[bool] | None = None,
    ) -> LowRankLinear:
        """The layer of a configuration beside the linear layer at a path of a model."""
        branches = config.branches(layer_names(path, stack_of(layer)), chosen)
        layer_key = prng.fold_path(key, path) if isinstance(key, jax.Array) else key
        return cls(layer, spec, config, branches, layer_key)

    def _initial(self, factor: Factor) -> Initial:
        """A copy of a factor, as a training step may reuse the factor's memory; or its shape."""
        return Initial(jnp.copy(factor) if isinstance(factor, jax.Array) else factor)

    def _first_factors(self, key: base.InitKey) -> tuple[Factor, Factor]:
        kernel = self.base_kernel.get_value()  # an array, or only its shape and sharding
        known = not base.is_abstract(kernel)
        return layout.place(
            initializers.first_factors,
            (self.config.init, self.spec, self.branches, kernel.shape),
            layout.factor_shardings(kernel, self.spec),
            key if isinstance(key, jax.Array) else None,
            kernel if known and self.config.init in FROM_KERNEL else None,
            abstract=self.abstract,
        )

    def per_layer(self, values: Sequence[float], dtype: str) -> PerLayer | None:
        """A number for each layer of a stack; None if all layers share one value.

        A Python constant is then used, which costs nothing.
        """
        if len(set(values)) == 1:
            return None
        kernel = self.base_kernel.get_value()
        shape, sharding = self.spec.stack(kernel), layout.letters_sharding(kernel, self.spec, "")

        static = (tuple(values), dtype, shape)
        return PerLayer(layout.place(_numbers, static, sharding, abstract=self.abstract))

    def mask_key_of(self, granularity: str | None) -> MaskKey:
        """A variable for the keys of a mask, which `draw` fills; it is empty at first."""
        keys = jnp.broadcast_to(prng.root_key(0), (*self.stack, 0))
        return MaskKey(keys, stack=self.stack, granularity=granularity)

    @property
    def stack(self) -> tuple[int, ...]:
        """The leading axes of stacked layers; empty for a single layer."""
        shape = self.lora_a.get_value().shape
        return shape[: len(shape) - len(self.spec.a)]

    @property
    def rank(self) -> int:
        """R of the factors: the largest of the layers' ranks."""
        return max(branch.rank for branch in self.branches)

    @property
    def adapted(self) -> Sequence[bool]:
        return [branch.rank > 0 for branch in self.branches]

    def _scale(self, index: base.Index = (), letters: str = "") -> float | Array:
        """The scale, shaped to multiply an array with axes `letters` behind those of the stack."""
        if self.scales is None:
            return self.branches[0].scale
        scales = self.scales[index or ...]
        return scales.reshape(scales.shape + (1,) * len(letters))

    def layer_rank(self) -> int | Array:
        """The rank of this layer of a stack."""
        return self.rank if self.ranks is None else self.ranks[...]

    def __call__(  # type: ignore[override]
        self,
        x: Array,
        *args: object,
        active: ActiveFactors | None = None,
        h: Array | None = None,
        **kwargs: object,
    ) -> Array:
        """Apply the layer.

        Args:
          active: `active_factors`, where the caller has them, and `h = x @ active.a` with them
            (`nn.branches.apply_all`).
          args, kwargs: whatever else the base is called with.
        """
        y = self.base(x, *args, **kwargs)
        active = self.active_factors(y.dtype) if active is None else active
        return self.ending(active)(y, self.hidden(x, y.dtype, active, h))

    def halves(
        self, dtype: DTypeLike
    ) -> tuple[Callable[[Array], Array], Callable[[Array, Array], Array]]:
        """`hidden` and `end`: the layer is `end(base(x), hidden(x))`; see `nn.branches.Halves`."""
        active = self.active_factors(dtype)
        return partial(self.hidden, dtype=dtype, active=active), self.ending(active)

    def active_factors(self, dtype: DTypeLike) -> ActiveFactors:
        """What this call computes with; the mask in `dtype`."""
        kept = self.subspace(dtype)
        return kept._replace(**dict(zip("ab", self._with_first(kept.a, kept.b), strict=True)))

    def hidden(
        self, x: Array, dtype: DTypeLike, active: ActiveFactors, h: Array | None = None
    ) -> Array:
        """The first half of the branch: `(x @ A) * m`, and `x @ A0` after it, in `dtype`.

        All that depends on a position's place is in it, so the second half may be computed for
        some positions only.
        """
        if h is None and self.spec.lookup is not None:
            h = self.spec.lookup(active.a, x).astype(dtype)
        elif h is None:
            x = self._input(self.spec.arrange(x).astype(dtype))
            (h,) = lowrank.compress(x, active.a, down=self.spec.down)
        if self.first_a is not None:
            first = self.first_a.shape[-1]
            h, h0 = h[..., :-first], h[..., -first:]
        mask = self.mask(h) if active.mask is None else active.mask
        if mask is not None:
            h = ops.times(h, mask)
        return h if self.first_a is None else jnp.concatenate([h, h0], axis=-1)

    def ending(self, active: ActiveFactors) -> Callable[[Array, Array], Array]:
        """The layer's output as a function of `base(x)` and `hidden(x)`.

        What does not depend on these two is computed here, once for however many calls.
        """
        delta = self.delta(active)
        return lambda y, h: y + delta(h)

    def delta(self, active: ActiveFactors) -> Callable[[Array], Array]:
        """The second half of the branch, as a function of `hidden(x)`."""
        return partial(lowrank.lowrank_delta, b=active.b, scale=self._scale(), up=self.spec.up)

    def transposed(self) -> LowRankLinear:
        """The layer of the transposed kernel with the same branch and masks.

        For a model whose head is its embedding. The base layer provides `transposed()`, the
        head without an adapter.
        """
        layer = nnx.merge(*nnx.split(self))
        layer.base = cast(Transposable, self.base).transposed()
        layer.spec = linear_spec(layer.base)
        layer.lora_a, layer.lora_b = (nnx.LoRAParam(f[...].T) for f in (self.lora_b, self.lora_a))
        if self.first_a is not None and self.first_b is not None:
            layer.first_a, layer.first_b = (
                Initial(self.first_b[...].T),
                Initial(self.first_a[...].T),
            )
        return layer

    @property
    def shares_input(self) -> bool:
        """Whether `x @ A` can be computed together with that of other layers.

        It can if A is a matrix and the layer drops no part of its input.
        """
        dropping = self.input_key is not None and self.input_key[...].size > 0
        return not dropping and self.spec.down == "...i,ir->...r"

    def _with_first(self, a: Array, b: Array, index: base.Index = ()) -> tuple[Array, Array]:
        """[A, A0] and [B; -B0]: the branch minus its initial value."""
        if self.first_a is None or self.first_b is None:
            return a, b
        first_a, first_b = self.first_a[index or ...], self.first_b[index or ...]
        rank_axis = -1 - len(self.spec.produced)
        return (
            jnp.concatenate([a, first_a], axis=-1),
            jnp.concatenate([b, -first_b], axis=rank_axis),
        )

    def _input(self, x: Array) -> Array:
        """The input of the branch, with parts of it dropped in training (`input_dropout`)."""
        if self.input_key is None or not self.input_key[...].size:
            return x
        keys = checked_rows(self.input_key[...], x)
        return x * lowrank.rank_mask(
            keys,
            x.shape,
            drop_rate=self.config.input_dropout,
            granularity="token",
            sampler="bernoulli",
            rescale=True,
            dtype=x.dtype,
        )

    def subspace(self, dtype: DTypeLike) -> ActiveFactors:
        """A and B; or, where a step's ranks are the same for all positions, only these ranks."""
        return ActiveFactors(self.lora_a[...], self.lora_b[...], None)

    def mask(self, h: Array) -> Array | None:
        """What multiplies `h = x @ A`, of any dtype; None for nothing."""
        return None

    def factors(self, index: base.Index = ()) -> tuple[Array, Array]:
        """A and B of the branch at evaluation, of one layer of a stack or of all of them.

        If the initial branch is subtracted, they have twice the rank: [A, A0] and [B; -B0].
        """
        return self._with_first(self.lora_a[index or ...], self.evaluated_b(index), index)

    def ranks_of(self, layer: int) -> np.ndarray:
        """Which ranks of `factors` a layer uses; the others are zero."""
        ranks = np.arange(self.branches[layer].rank)
        return ranks if self.first_a is None else np.concatenate([ranks, self.rank + ranks])

    def stored(self) -> dict[str, Array]:
        """The arrays that a file of the adapter holds: `factors`, and what else a kind trains."""
        a, b = self.factors()
        return {"lora_a": a, "lora_b": b}

    def fill(self, stored: Mapping[str, Array]) -> None:
        """Set the adapter, in place, to what `stored` returned: it is the same at evaluation."""
        a, b = stored["lora_a"], stored["lora_b"]
        if self.first_a is not None and self.first_b is not None:
            rank_axis = -1 - len(self.spec.produced)
            a, first_a = jnp.split(a, 2, axis=-1)
            b, first_b = jnp.split(b, 2, axis=rank_axis)
            self.first_a, self.first_b = Initial(first_a), Initial(-first_b)
        self.lora_a, self.lora_b = nnx.LoRAParam(a), nnx.LoRAParam(b)

    def evaluated_b(self, index: base.Index = ()) -> Array:
        """B with the mask that the kind applies at evaluation multiplied into it."""
        return self.lora_b[index or ...]

    def merged_kernel(self, kernel: Array, index: base.Index = ()) -> Array:
        a, b = self.factors(index)
        scale = self._scale(index, self.spec.kernel)
        return lowrank.merged_kernel(kernel, a, b, scale=scale, product=self.spec.product)


def _numbers(values: tuple[float, ...], dtype: str, shape: tuple[int, ...]) -> Array:
    return jnp.asarray(values, dtype=dtype).reshape(shape)
