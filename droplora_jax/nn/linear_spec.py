"""A linear layer as an einsum: flax's own, other libraries' by name, and what a user registers."""

from __future__ import annotations

import string
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import singledispatch
from typing import Any

import jax.numpy as jnp
from flax import nnx
from jaxtyping import Array

from droplora_jax.core.errors import InputError


@dataclass(frozen=True)
class LinearSpec:
    """A linear layer `inputs, kernel -> outputs` in einsum letters.

    Attributes:
      inputs, kernel, outputs: subscripts, such as `...i`, `io`, `...o`.
      axes: axes of the input that hold the contracted letters, if they are not the last ones.
      attribute: the layer's attribute with the kernel variable.
      lookup: of a layer whose input is an index of the contracted letter, an embedding: the rows
        of a table [i, any] at such indices.
      tied: the transpose of the kernel is in use too: an embedding that is the model's head.
    """

    inputs: str
    kernel: str
    outputs: str
    axes: tuple[int, ...] = ()
    attribute: str = "kernel"
    lookup: Callable[[Array, Array], Array] | None = None
    tied: bool = False

    @property
    def contracted(self) -> str:
        return "".join(c for c in self.kernel if c in self.inputs and c not in self.outputs)

    @property
    def produced(self) -> str:
        return "".join(c for c in self.kernel if c in self.outputs and c not in self.inputs)

    @property
    def batched(self) -> str:
        return "".join(c for c in self.kernel if c in self.outputs and c in self.inputs)

    @property
    def rank(self) -> str:
        used = self.inputs + self.kernel + self.outputs
        return next(c for c in "r" + string.ascii_letters if c not in used)

    @property
    def a(self) -> str:
        return self.batched + self.contracted + self.rank

    @property
    def b(self) -> str:
        return self.batched + self.rank + self.produced

    @property
    def hidden(self) -> str:
        """`x @ A`: what the input has beside the contracted letters, and the rank last."""
        return "".join(c for c in self.inputs if c not in self.contracted) + self.rank

    @property
    def down(self) -> str:
        return f"{self.inputs},{self.a}->{self.hidden}"

    @property
    def up(self) -> str:
        return f"{self.hidden},{self.b}->{self.outputs}"

    @property
    def product(self) -> str:
        """`A @ B` in the kernel's own order, whatever axes are stacked in front."""
        return f"...{self.a},...{self.b}->...{self.kernel}"

    def stack(self, kernel: Any) -> tuple[int, ...]:
        """The leading axes of a stacked kernel, an array or only its shape."""
        return kernel.shape[: kernel.ndim - len(self.kernel)]

    def arrange(self, x: Array) -> Array:
        """Move the contracted axes of `x` last."""
        if not self.axes:
            return x
        return jnp.moveaxis(x, self.axes, range(-len(self.axes), 0))


@singledispatch
def linear_spec(layer: Any) -> LinearSpec:
    """How to read a layer as an einsum.

    Register another linear type with
    `@linear_spec.register(MyLinear)` on a function from the layer to its `LinearSpec`.

    Raises:
      InputError: not a linear layer, or one that can't be adapted as it is.
    """
    if (read := _known(type(layer))) is None:
        raise InputError(f"{type(layer).__name__} is no linear layer; see linear_spec.register")
    return read(layer)


def is_linear(layer: Any) -> bool:
    """Whether a layer's type is registered with `linear_spec`, or known by its name."""
    kind = type(layer)
    return linear_spec.dispatch(kind) is not linear_spec.dispatch(object) or bool(_known(kind))


@linear_spec.register(nnx.Linear)
def _linear(layer: nnx.Linear) -> LinearSpec:
    return LinearSpec("...i", "io", "...o")


@linear_spec.register(nnx.LinearGeneral)
def _linear_general(layer: nnx.LinearGeneral) -> LinearSpec:
    if layer.batch_axis:
        raise InputError(
            f"nnx.LinearGeneral with batch_axis={dict(layer.batch_axis)} can't be adapted: "
            "write it as nnx.Einsum, or leave it out of the targets"
        )
    return general_spec(layer.axis, layer.out_features)


def general_spec(axis: int | Sequence[int], features: int | Sequence[int]) -> LinearSpec:
    """The axes `axis` of the input contracted, and axes of the sizes `features` put last."""
    axes = tuple(axis) if isinstance(axis, Sequence) else (axis,)
    produced = len(features) if isinstance(features, Sequence) else 1
    letters = "abcdefghijklmnopqstuvwxyz"
    i, o = letters[: len(axes)], letters[len(axes) : len(axes) + produced]
    return LinearSpec(f"...{i}", i + o, f"...{o}", axes=axes)


@linear_spec.register(nnx.Einsum)
def _einsum(layer: nnx.Einsum) -> LinearSpec:
    if layer.einsum_str is None:
        raise InputError(
            "nnx.Einsum without an einsum_str of its own can't be adapted: give it one"
        )
    return einsum_spec(layer.einsum_str)


def einsum_spec(equation: str, attribute: str = "kernel") -> LinearSpec:
    """`inputs,kernel->outputs` as it is written."""
    operands, outputs = equation.replace(" ", "").split("->")
    inputs, kernel = operands.split(",")
    return LinearSpec(inputs, kernel, outputs, attribute=attribute)


def stack_of(layer: nnx.Module) -> tuple[int, ...]:
    """The leading axes of a linear layer's kernel; none for a layer that can't be adapted."""
    try:
        spec = linear_spec(layer)
    except InputError:
        return ()
    return spec.stack(getattr(layer, spec.attribute).get_value())


def _tunix_einsum(layer: Any) -> LinearSpec:
    if getattr(layer, "w_scale", None) is not None:
        raise InputError("an Einsum whose kernel is scaled as it is read can't be adapted")
    return einsum_spec(layer.einsum_str, attribute="w")


def _maxtext_dense(layer: Any) -> LinearSpec:
    if layer.quant is not None or layer.kernel_scale is not None:
        raise InputError("a quantised DenseGeneral can't be adapted: its kernel is no plain array")
    return general_spec(layer.axis, layer.out_features_shape)


# By name, so that none of these libraries is imported, and none has to be installed.
KNOWN: dict[str, Callable[[Any], LinearSpec]] = {
    "tunix.models.gemma.model.Einsum": _tunix_einsum,
    "tunix.models.gemma3.model.Einsum": _tunix_einsum,
    "tunix.models.gemma4.model.Einsum": _tunix_einsum,
    "tunix.models.llama3.model.Einsum": _tunix_einsum,
    "tunix.models.qwen2.model.Einsum": _tunix_einsum,
    "tunix.models.qwen3.model.Einsum": _tunix_einsum,
    "maxtext.layers.linears.DenseGeneral": _maxtext_dense,
}


def _known(kind: type) -> Callable[[Any], LinearSpec] | None:
    names = (f"{base.__module__}.{base.__qualname__}" for base in kind.__mro__)
    return next((KNOWN[name] for name in names if name in KNOWN), None)
