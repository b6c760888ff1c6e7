"""The contract of a kind of adapter: `AdapterConfig` says what to adapt, `Adapter` is the layer.

A new kind is a file of options (a frozen dataclass, which imports no JAX), a file with its layer,
and a line in `ADAPTERS`.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from functools import lru_cache
from typing import Any, Literal, Protocol, runtime_checkable

import jax
from flax import nnx
from jax.sharding import Sharding
from jaxtyping import Array, Key

from droplora_jax.nn.layer_paths import Path, dotted
from droplora_jax.nn.linear_spec import LinearSpec
from droplora_jax.nn.quantized_kernel import Quantized, dense

# Where initial values come from. A PRNG key: drawn from it. "later": zeros until a checkpoint or a
# file fills them. None: shapes only.
InitKey = Key[Array, ""] | Literal["later"] | None

Index = tuple[Array | int, ...]  # the place of a layer in a stack; empty: all of the stack


class Adapter(nnx.Module):
    """A frozen linear layer `base`, and what is trained beside it.

    An adapter stands in a model where its base stood, and the model calls it as it called the base.
    What is trained are its variables of the type `nnx.LoRAParam`; what a step's randomness depends
    on are its variables of the type `MaskKey`, which are empty in evaluation. All else is frozen.
    `split` sorts them so.

    At evaluation an adapter is the linear layer with another kernel: `merged_kernel` says which.
    So a kind has to be linear in its input once its masks are off. A subclass defines `__call__`,
    `merged_kernel` and `adapted`; it must be unchanged by jit, by a scan over stacked layers and by
    rematerialisation, so it holds no state of Python's that a call changes.
    """

    base: nnx.Module
    spec: LinearSpec

    def __call__(self, x: Array, *args: object, **kwargs: object) -> Array:
        raise NotImplementedError

    def merged_kernel(self, kernel: Array, index: Index = ()) -> Array:
        """The float32 kernel that replaces `kernel` at evaluation.

        Args:
          kernel: the base's, as a plain array; of one layer, or of a whole stack.
          index: the place of `kernel` in the stack; empty for all layers of the stack at once.
        """
        raise NotImplementedError

    @property
    def adapted(self) -> Sequence[bool]:
        """Which layers of the stack have an adapter; one value for a single layer."""
        raise NotImplementedError

    def merger(self, sharding: Sharding | None = None) -> Callable[..., Array]:
        """`merged_kernel` compiled, as a function of `kernel, *index`; the kernel may be quantised.

        Adapters of equal options and shapes share one program.
        """
        graphdef, state = nnx.split(self)
        program = _merge_program(sharding)
        return lambda kernel, *index: program(graphdef, state, kernel, index)

    def __getattr__(self, name: str) -> Any:
        """Attributes that a model reads from a layer, such as its shape, are the base's.

        The kernel is not: a model that multiplies by it, rather than call the layer, would skip
        the branch.
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
        """The frozen kernel as an array, dequantised; a stack may be large."""
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
    """What `inject` needs to know of an adapter, and the maker of its layers.

    `inject` finds the linear layers of a model, keeps those that a pattern of `targets` matches and
    no pattern of `exclude` does, and calls `adapt` for each: once for a layer, and once for a whole
    stack of layers with leading axes. A pattern is a regular expression, or a name of
    `NAMED_TARGETS`, searched in the dotted path of the layer. Parameters that `train_whole` matches
    are trained too, in float32.

    A configuration is frozen and hashable, since it is a part of the model's static structure: two
    models of equal configurations share their compiled programs. It checks its options when it is
    made, and says all that is wrong with them in one InputError, each problem beginning with the
    name of the option.
    """

    @property
    def targets(self) -> str | tuple[str, ...]: ...

    @property
    def exclude(self) -> tuple[str, ...]: ...

    @property
    def train_whole(self) -> tuple[str, ...]: ...

    @property
    def patterns(self) -> Mapping[str, tuple[str, ...]]:
        """The patterns of each further option; `inject` checks that each matches a layer."""
        ...

    def adapt(
        self,
        layer: nnx.Module,
        spec: LinearSpec,
        path: Path,
        key: InitKey,
        chosen: Sequence[bool] | None = None,
    ) -> Adapter:
        """The adapter beside one layer, or beside one stack of layers.

        The initial values must be a function of `key`, `path` and the index in the stack alone, so
        that they are the same on every mesh, and whatever else is adapted. They must leave the
        model's outputs unchanged.

        Args:
          layer: the base; it is not changed.
          spec: how the layer multiplies by its kernel.
          path: the layer's path in the model.
          key: the root of initial values; fold the path into it (`prng.fold_path`).
          chosen: which layers of a stack have an adapter; all of them by default.
        """
        ...


@lru_cache(maxsize=64)
def _merge_program(sharding: Sharding | None) -> Callable[..., Array]:
    def merge(
        graphdef: nnx.GraphDef,
        state: nnx.State,
        kernel: Array | Quantized,
        index: Index,
    ) -> Array:
        return nnx.merge(graphdef, state).merged_kernel(dense(kernel), index)

    return jax.jit(merge, out_shardings=sharding)


def is_abstract(kernel: object) -> bool:
    """Whether a kernel has a shape and no values."""
    return isinstance(jax.tree.leaves(kernel)[0], jax.ShapeDtypeStruct)


def base_path(path: Path) -> str:
    """The dotted path that a parameter of a model with adapters has in the plain model."""
    return dotted(path).replace(".base.", ".")
