"""What every adapter kind has in common: a frozen linear layer, its keys, and how it is merged.

A new kind is one file beside this one (a frozen configuration with `adapt`, and the `Adapter`
that it makes) and one line in `ADAPTERS`.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import Any, Literal, Protocol, runtime_checkable

import jax
from flax import nnx
from jaxtyping import Array, Key

from droplora_jax.nn.layer_paths import Path, dotted
from droplora_jax.nn.linear_spec import LinearSpec
from droplora_jax.nn.quantized_kernel import dense

# The root of initial values; or none: `later` for zeros, and None for shapes only.
InitKey = Key[Array, ""] | Literal["later"] | None


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
            return nnx.merge(graphdef, factors, rest).merged_kernel(dense(kernel), index)

        compiled = jax.jit(merge, out_shardings=sharding)
        return lambda kernel, *index: compiled(kernel, factors, index)

    def __getattr__(self, name: str) -> Any:
        """What a model asks a layer beside calling it, such as its shape, is the base's.

        But not the kernel: a model that multiplies by it itself would pass the branch by.
        """
        if name in ("base", "spec") or name.startswith("_"):
            raise AttributeError(name)
        if name == self.spec.attribute:
            raise AttributeError(
                f"{name!r} of a {type(self.base).__name__} with an adapter: call the layer, or "
                "leave it out of the targets"
            )
        return getattr(self.base, name)

    @property
    def base_kernel(self) -> nnx.Variable:
        """The frozen kernel variable of the base; its value may be quantised."""
        return getattr(self.base, self.spec.attribute)

    def dense_kernel(self) -> Array:
        """The frozen kernel as an array: of one layer, if it may be large."""
        return dense(self.base_kernel.get_value())

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


def is_abstract(kernel: Any) -> bool:
    """Whether a kernel's value is a shape only."""
    return isinstance(jax.tree.leaves(kernel)[0], jax.ShapeDtypeStruct)


def base_path(path: Path) -> str:
    """The dotted path that a parameter of a model with adapters has in the plain model."""
    return dotted(path).replace(".base.", ".")
