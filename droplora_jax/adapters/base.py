"""What every adapter kind has in common: a frozen linear layer seen as an einsum, and its keys.

A new kind is one file beside this one (a frozen configuration with `adapt`, and the `Adapter`
that it makes) and one line in `ADAPTERS`.
"""

from __future__ import annotations

import string
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from functools import singledispatch
from typing import Any, Literal, Protocol, runtime_checkable

import jax
import jax.numpy as jnp
from flax import nnx
from jaxtyping import Array, Key

from droplora_jax.adapters.targets import Path, dotted
from droplora_jax.errors import InputError

# The root of initial values; or none: `later` for zeros, and None for shapes only.
InitKey = Key[Array, ""] | Literal["later"] | None


class MaskKey(nnx.Variable):
    """The keys of one adapter's rank mask, [*stack, n]; n = 0 means no mask (evaluation).

    Filled for one step by `droplora_jax.draw`. Its metadata: `stack`, the leading axes of stacked
    layers, and `granularity`, None where the adapter never draws.
    """


class DropShare(MaskKey):
    """What share of its drop rate an adapter has in this step, [*stack], where that changes.

    Filled for one step by `droplora_jax.draw` too.
    """


@dataclass(frozen=True)
class LinearSpec:
    """A linear layer `inputs, kernel -> outputs` in einsum letters.

    Attributes:
      inputs, kernel, outputs: subscripts, such as `...i`, `io`, `...o`.
      axes: axes of the input that hold the contracted letters, if they are not the last ones.
      attribute: the layer's attribute with the kernel variable.
    """

    inputs: str
    kernel: str
    outputs: str
    axes: tuple[int, ...] = ()
    attribute: str = "kernel"

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
    raise InputError(f"{type(layer).__name__} is no linear layer; see linear_spec.register")


def is_linear(layer: Any) -> bool:
    """Whether a layer's type is registered with `linear_spec`."""
    return linear_spec.dispatch(type(layer)) is not linear_spec.dispatch(object)


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
    axes = tuple(layer.axis) if isinstance(layer.axis, Sequence) else (layer.axis,)
    features_in = layer.in_features if isinstance(layer.in_features, Sequence) else (0,)
    features_out = layer.out_features if isinstance(layer.out_features, Sequence) else (0,)
    letters = iter("abcdefghijklmnopqstuvwxyz")
    i = "".join(next(letters) for _ in features_in)
    o = "".join(next(letters) for _ in features_out)
    return LinearSpec(f"...{i}", i + o, f"...{o}", axes=axes)


@linear_spec.register(nnx.Einsum)
def _einsum(layer: nnx.Einsum) -> LinearSpec:
    if layer.einsum_str is None:
        raise InputError(
            "nnx.Einsum without an einsum_str of its own can't be adapted: give it one"
        )
    operands, outputs = layer.einsum_str.replace(" ", "").split("->")
    inputs, kernel = operands.split(",")
    return LinearSpec(inputs, kernel, outputs)


class Adapter(nnx.Module):
    """A frozen linear layer and what is trained beside it.

    Subclasses define `__call__`, `merged_kernel` and `adapted`.
    """

    base: nnx.Module
    spec: LinearSpec

    def __call__(self, x: Array, *args: Any, **kwargs: Any) -> Array:
        raise NotImplementedError

    def merged_kernel(self, kernel: Array, index: tuple[Any, ...] = ()) -> Array:
        """The float32 kernel that replaces `kernel` at evaluation.

        `index` picks one layer of a stacked adapter, and `kernel` is that layer's.
        """
        raise NotImplementedError

    @property
    def adapted(self) -> Sequence[bool]:
        """Of a stack, which of its layers have an adapter."""
        raise NotImplementedError

    def merger(self, sharding: Any = None) -> Callable[..., Array]:
        """`merged_kernel(kernel, index)` compiled, as a function of `kernel, *index`."""
        parts: Any = nnx.split(self, nnx.LoRAParam, ...)
        graphdef, factors, rest = parts

        # The factors are arguments: as constants their product would be made by the compiler.
        def merge(kernel, factors, index):
            return nnx.merge(graphdef, factors, rest).merged_kernel(kernel, index)

        compiled = jax.jit(merge, out_shardings=sharding)
        return lambda kernel, *index: compiled(kernel, factors, index)

    @property
    def kernel(self) -> nnx.Variable:
        """The frozen kernel variable of the base."""
        return getattr(self.base, self.spec.attribute)

    def merged(self) -> nnx.Module:
        """The base layer with the merged kernel in the base's dtype; the adapter is unchanged."""
        layer = nnx.merge(*nnx.split(self.base))
        kernel = getattr(layer, self.spec.attribute)
        value = kernel.get_value()
        merged = self.merger(getattr(value, "sharding", None))(value)  # a tracer has none
        setattr(layer, self.spec.attribute, kernel.replace(merged.astype(value.dtype)))
        return layer


@runtime_checkable
class AdapterConfig(Protocol):
    """What `inject` needs of an adapter's configuration."""

    @property
    def targets(self) -> str | tuple[str, ...]: ...

    @property
    def exclude(self) -> tuple[str, ...]: ...

    @property
    def train_whole(self) -> tuple[str, ...]: ...

    @property
    def patterns(self) -> Mapping[str, tuple[str, ...]]:
        """The patterns of each further option, which have to match something."""
        ...

    def adapt(
        self,
        layer: nnx.Module,
        spec: LinearSpec,
        path: Path,
        key: InitKey,
        chosen: Sequence[bool] | None = None,
    ) -> Adapter:
        """Wrap one layer.

        Args:
          key: the run's `init_key`; fold the path into it.
          chosen: of a stack, which of its layers have an adapter; all of them by default.
        """
        ...


def base_path(path: Path) -> str:
    """The dotted path that a parameter of a model with adapters has in the plain model."""
    return dotted(path).replace(".base.", ".")


def stack_of(layer: nnx.Module) -> tuple[int, ...]:
    """The leading axes of a linear layer's kernel; none for a layer that can't be adapted."""
    try:
        spec = linear_spec(layer)
    except InputError:
        return ()
    return spec.stack(getattr(layer, spec.attribute).get_value())
