"""The layer of DoRA: direction and magnitude of the kernel's columns are trained apart."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from functools import partial

import jax
import jax.numpy as jnp
from flax import nnx
from jaxtyping import Array

from droplora_jax.adapters import base, layout
from droplora_jax.adapters.config import Branch
from droplora_jax.adapters.droplora import DropLoRA
from droplora_jax.adapters.droplora_layer import DropLoRALinear
from droplora_jax.core import einsum
from droplora_jax.core.errors import InputError
from droplora_jax.nn import ops
from droplora_jax.nn.branches import ActiveFactors
from droplora_jax.nn.linear_spec import LinearSpec
from droplora_jax.nn.quantized_kernel import Quantized, dense


class DoRALinear(DropLoRALinear):
    """`y = g * (x @ W + scale * ((x @ A) * m) @ B) + bias`, g = magnitude / ||W + scale * A @ B||.

    The norm, over a column's inputs, is a constant to the gradient (section 4.3 of the paper).
    `magnitude` [*stack, *out] starts as the norm of W, so the model is unchanged at first.
    """

    def __init__(
        self,
        layer: nnx.Module,
        spec: LinearSpec,
        config: DropLoRA,
        branches: tuple[Branch, ...],
        key: base.InitKey,
    ) -> None:
        if spec.tied:
            raise InputError(
                "kind='dora': this model's head is its embedding (tie_word_embeddings), "
                "and columns of one are rows of the other, so it has no magnitude for both; leave "
                "embed out of targets, or take another kind"
            )
        super().__init__(layer, spec, config, branches, key)
        kernel = self.base_kernel.get_value()
        letters = _columns(spec)
        sharding = layout.letters_sharding(kernel, spec, letters)
        if base.is_abstract(kernel) or not isinstance(key, jax.Array):
            shape = layout.letters_shape(kernel, spec, letters)
            self.magnitude = nnx.LoRAParam(
                layout.place(layout.full, (shape, 1.0), sharding, abstract=self.abstract)
            )
        else:
            norm = layout.place(_norms, (spec,), sharding, kernel)
            self.magnitude = nnx.LoRAParam(norm)

    def ending(self, active: ActiveFactors) -> Callable[[Array, Array], Array]:
        delta = self.delta(active)
        gain = _beside_outputs(self._gain(self._norm_of_sum()), self.spec)
        bias = getattr(self.base, "bias", None)

        def end(y: Array, h: Array) -> Array:
            product = y if bias is None else ops.plus(y, -bias[...])
            return _sum(y, ops.times(product, gain - 1), ops.times(delta(h), gain))

        return end

    def stored(self) -> dict[str, Array]:
        return {**super().stored(), "magnitude": self.magnitude[...]}

    def fill(self, stored: Mapping[str, Array]) -> None:
        super().fill(stored)
        self.magnitude = nnx.LoRAParam(stored["magnitude"])

    def merged_kernel(self, kernel: Array, index: base.Index = ()) -> Array:
        merged = super().merged_kernel(kernel, index)
        gain = self._gain(_norm(merged, self.spec), index)
        letters = self.spec.kernel
        product = f"...{letters},...{_columns(self.spec)}->...{letters}"
        return jnp.einsum(product, merged, gain)

    def _gain(self, norm: Array, index: base.Index = ()) -> Array:
        gain = self.magnitude[index or ...] / norm
        if self.ranks is None:
            return gain
        # A layer of the stack without a branch is left as it is.
        ranks = self.ranks[index or ...]
        adapted = ranks.reshape(ranks.shape + (1,) * len(_columns(self.spec))) > 0
        return jnp.where(adapted, gain, 1.0)

    def _norm_of_sum(self) -> Array:
        """||W + scale * A @ B|| by column, from products that are no larger than A and B."""
        spec = self.spec
        w, a, b = jax.lax.stop_gradient((self.dense_kernel(), *self.factors()))
        columns, other = _columns(spec), "z"
        b = b * self._scale()
        aw = einsum.einsum_f32(f"{spec.a},{spec.kernel}->{spec.b}", a.astype(w.dtype), w)
        aa = jnp.einsum(
            f"{spec.a},{spec.a.replace(spec.rank, other)}->{spec.batched}{spec.rank}{other}", a, a
        )
        ab = jnp.einsum(
            f"{spec.batched}{spec.rank}{other},{spec.b.replace(spec.rank, other)}->{spec.b}", aa, b
        )
        cross = jnp.einsum(f"{spec.b},{spec.b}->{columns}", 2 * aw + ab, b)
        return jnp.sqrt(_squares(w, spec) + cross)


def _sum(y: Array, *terms: Array) -> Array:
    """The sum in the dtype of y, rounded once: each term may be small beside y."""
    wide = jnp.float32 if y.dtype.itemsize < 4 else y.dtype
    return sum((term.astype(wide) for term in terms), y.astype(wide)).astype(y.dtype)


def _columns(spec: LinearSpec) -> str:
    """The letters of a kernel that are not summed over."""
    return "".join(c for c in spec.kernel if c not in spec.contracted)


def _beside_outputs(gain: Array, spec: LinearSpec) -> Array:
    """A number for every column, to multiply the layer's outputs.

    (A product of arrays, not an einsum: for the gradient of that XLA's partitioner of jax 0.10 adds
    up wrong parts on a mesh that splits rows in two ways and outputs in a third.)
    """
    letters = spec.outputs.rpartition("...")[2]
    columns = _columns(spec)
    ordered = jnp.einsum(f"{columns}->{''.join(c for c in letters if c in columns)}", gain)
    sizes = iter(ordered.shape)
    return ordered.reshape([next(sizes) if c in columns else 1 for c in letters])


def _squares(kernel: Array, spec: LinearSpec) -> Array:
    axes = tuple(spec.kernel.index(c) - len(spec.kernel) for c in spec.contracted)
    return jnp.sum(jnp.square(kernel.astype(jnp.float32)), axis=axes)


def _norms(spec: LinearSpec, kernel: Array | Quantized) -> Array:
    """Column norms, one layer of a stack at a time.

    So at most one quantised layer is dequantised at once.
    """

    def norm(kernel: Array | Quantized) -> Array:
        return _norm(dense(kernel), spec)

    for _ in spec.stack(kernel):
        norm = partial(jax.lax.map, norm)
    return norm(kernel)


def _norm(kernel: Array, spec: LinearSpec) -> Array:
    return jnp.sqrt(_squares(kernel, spec))
