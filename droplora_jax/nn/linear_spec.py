"""Linear layers as einsums: Flax's own, other libraries' by name, and those a user registers."""

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

    From it follow the products of a low-rank branch. A projection to heads, `BTD,DNH->BTNH`, for
    example: `d` is contracted, `n` and `h` are produced, so A is `dr` and B is `rnh`, and the
    branch is `btd,dr->btr` followed by `btr,rnh->btnh`:

    >>> spec = LinearSpec("btd", "dnh", "btnh")
    >>> spec.a, spec.b
    ('dr', 'rnh')
    >>> spec.down, spec.up
    ('btd,dr->btr', 'btr,rnh->btnh')
    >>> spec.product
    '...dr,...rnh->...dnh'

    A letter of the kernel that is in both inputs and outputs is batched (an expert, for example):
    A and B have it too, and each of its values is a layer by itself.

    >>> experts = LinearSpec("ebi", "eio", "ebo")
    >>> experts.a, experts.b, experts.down
    ('eir', 'ero', 'ebi,eir->ebr')

    Attributes:
      inputs, kernel, outputs: subscripts, such as `...i`, `io`, `...o`.
      axes: the input's axes with the contracted letters, if they are not the last ones.
      attribute: the layer's attribute with the kernel variable.
      lookup: for a layer whose input is an index of the contracted letter (an embedding): a
        function from a table [i, any] and indices to the table's rows.
      tied: the kernel's transpose is used as well: an embedding that is also the model's head.
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
        """The kernel's letters that are summed over: the layer's input width."""
        return "".join(c for c in self.kernel if c in self.inputs and c not in self.outputs)

    @property
    def produced(self) -> str:
        """The kernel's letters that only the output has: the layer's output width."""
        return "".join(c for c in self.kernel if c in self.outputs and c not in self.inputs)

    @property
    def batched(self) -> str:
        """The kernel's letters that input and output share."""
        return "".join(c for c in self.kernel if c in self.outputs and c in self.inputs)

    @property
    def rank(self) -> str:
        """A letter that is free: `r` if possible."""
        used = self.inputs + self.kernel + self.outputs
        return next(c for c in "r" + string.ascii_letters if c not in used)

    @property
    def a(self) -> str:
        """The axes of A, without those of a stack."""
        return self.batched + self.contracted + self.rank

    @property
    def b(self) -> str:
        """The axes of B, without those of a stack."""
        return self.batched + self.rank + self.produced

    @property
    def hidden(self) -> str:
        """The axes of `x @ A`: those of the input that are not contracted, then the rank."""
        return "".join(c for c in self.inputs if c not in self.contracted) + self.rank

    @property
    def down(self) -> str:
        """The einsum `x @ A`."""
        return f"{self.inputs},{self.a}->{self.hidden}"

    @property
    def up(self) -> str:
        """The einsum `h @ B`."""
        return f"{self.hidden},{self.b}->{self.outputs}"

    @property
    def product(self) -> str:
        """The einsum `A @ B` in the kernel's order of axes, with any leading axes of a stack."""
        return f"...{self.a},...{self.b}->...{self.kernel}"

    def stack(self, kernel: Any) -> tuple[int, ...]:
        """The leading axes of a stacked kernel, which may be only a shape."""
        return kernel.shape[: kernel.ndim - len(self.kernel)]

    def arrange(self, x: Array) -> Array:
        """Move the contracted axes of `x` last."""
        if not self.axes:
            return x
        return jnp.moveaxis(x, self.axes, range(-len(self.axes), 0))


@singledispatch
def linear_spec(layer: Any) -> LinearSpec:
    """How to read a layer as an einsum: the table of linear layers that adapters can be put on.

    Flax's own linear layers are in it, and some of Tunix and MaxText. Register another type on a
    function from the layer to its `LinearSpec`:

    >>> class Scaled(nnx.Module):  # y = 2 * x @ weight, weight [in, out]
    ...     def __init__(self, weight):
    ...         self.weight = nnx.Param(weight)
    >>> @linear_spec.register(Scaled)
    ... def _(layer):
    ...     return LinearSpec("...i", "io", "...o", attribute="weight")
    >>> linear_spec(Scaled(jnp.ones((3, 2)))).down
    '...i,ir->...r'
    >>> linear_spec(nnx.Linear(3, 2, rngs=nnx.Rngs(0))).attribute
    'kernel'

    Args:
      layer: a layer, such as a leaf of a model.

    Raises:
      InputError: not a linear layer, or one that can't be adapted as it is.
    """
    if (read := _known(type(layer))) is None:
        raise InputError(f"{type(layer).__name__} is no linear layer; see linear_spec.register")
    return read(layer)


def is_linear(layer: Any) -> bool:
    """Whether a layer's type is registered with `linear_spec`, or known by name."""
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
    """Contracts the axes `axis` of the input; new axes of the sizes `features` come last."""
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
    """The layer of an equation `inputs,kernel->outputs`."""
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


# By name, so that these libraries are neither imported nor required.
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
