"""The shapes and shardings of an adapter's arrays, which follow from the kernel's."""

from __future__ import annotations

from collections.abc import Callable, Hashable
from functools import lru_cache, partial
from typing import TypeAlias, TypeVar, cast

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import Mesh, NamedSharding, PartitionSpec, Sharding
from jaxtyping import Array

from droplora_jax.core.sharding import RULES, axis_size
from droplora_jax.nn.linear_spec import LinearSpec
from droplora_jax.nn.quantized_kernel import Quantized

Kernel: TypeAlias = Array | np.ndarray | jax.ShapeDtypeStruct | Quantized
Axes: TypeAlias = str | tuple[str, ...] | None  # the mesh axes of one dimension
Shardings: TypeAlias = Sharding | tuple[Sharding | None, ...] | None
Made = TypeVar("Made")  # an array or a tuple of arrays


def factor_shardings(kernel: Kernel, spec: LinearSpec) -> tuple[NamedSharding | None, ...]:
    """The shardings of A, as of the kernel's inputs, and of B, as of its outputs.

    The factor that is left without the mesh axes of `width` takes them on its long dimension, so
    that no factor and no optimizer moment is replicated over them. (None, None) for a kernel that
    is not on a named mesh.
    """
    if (layout := _layout(kernel, spec)) is None:
        return None, None
    mesh, stack, by_letter = layout
    spread = tuple(name for name in RULES["width"] or () if name in mesh.shape)
    sizes = dict(zip(spec.kernel, kernel.shape[len(stack) :], strict=True))

    def factor(letters: str, long: str) -> NamedSharding:
        axes = {c: by_letter.get(c) for c in letters}
        used = {name for entry in [*stack, *axes.values()] for name in _names(entry)}
        for c in sorted(long, key=lambda c: -sizes[c]):
            names = (*_names(axes[c]), *spread)
            if not used & set(spread) and sizes[c] % axis_size(mesh, names) == 0:
                axes[c] = names or None
                break
        return NamedSharding(mesh, PartitionSpec(*stack, *(axes[c] for c in letters)))

    return factor(spec.a, spec.contracted), factor(spec.b, spec.produced)


def _names(entry: Axes) -> tuple[str, ...]:
    if entry is None:
        return ()
    return (entry,) if isinstance(entry, str) else tuple(entry)


def letters_sharding(kernel: Kernel, spec: LinearSpec, letters: str) -> NamedSharding | None:
    """The sharding of an array with some of the kernel's letters: as of the kernel."""
    if (layout := _layout(kernel, spec)) is None:
        return None
    mesh, stack, by_letter = layout
    return NamedSharding(mesh, PartitionSpec(*stack, *map(by_letter.get, letters)))


def _layout(kernel: Kernel, spec: LinearSpec) -> tuple[Mesh, list[Axes], dict[str, Axes]] | None:
    """A kernel's mesh, and the mesh axes of its stack and of its letters; None without a mesh."""
    sharding = getattr(kernel, "sharding", None)
    if not isinstance(sharding, NamedSharding):
        return None
    entries = [*sharding.spec, *[None] * (kernel.ndim - len(sharding.spec))]
    stack = len(spec.stack(kernel))
    return (
        cast(Mesh, sharding.mesh),
        entries[:stack],
        dict(zip(spec.kernel, entries[stack:], strict=True)),
    )


def letters_shape(kernel: Kernel, spec: LinearSpec, letters: str, **sizes: int) -> tuple[int, ...]:
    """The shape of an array of some letters, stack axes in front; `sizes` of further letters."""
    stack = spec.stack(kernel)
    sizes |= dict(zip(spec.kernel, kernel.shape[len(stack) :], strict=True))
    return stack + tuple(sizes[c] for c in letters)


def factor_shapes(
    kernel: Kernel, spec: LinearSpec, rank: int
) -> tuple[tuple[int, ...], tuple[int, ...]]:
    """The shapes of A and B for one kernel, stack axes in front."""
    of_a, of_b = (
        letters_shape(kernel, spec, letters, **{spec.rank: rank}) for letters in (spec.a, spec.b)
    )
    return of_a, of_b


def place(
    make: Callable[..., Made],
    static: tuple[Hashable, ...],
    sharding: Shardings,
    *arguments: Kernel | None,
    abstract: bool = False,
) -> Made:
    """`make(*static, *arguments)`, created with `sharding`; a tuple, with a tuple of shardings.

    Layers whose `static` and `arguments` have equal values and shapes share one compiled program,
    so `make` is a function of a module.

    Args:
      make: returns an array, or a tuple of arrays.
      static: its first arguments, which are no arrays.
      arguments: its further ones, which are: keys, kernels.
      abstract: return shapes with shardings only.
    """
    if abstract:
        shapes = jax.eval_shape(partial(make, *static), *arguments)
        if isinstance(sharding, tuple):
            return cast(Made, tuple(map(_shape_at, shapes, sharding)))
        return cast(Made, _shape_at(shapes, sharding))
    return _program(make, static, sharding)(*arguments)


@lru_cache(maxsize=256)
def _program(
    make: Callable[..., Made], static: tuple[Hashable, ...], sharding: Shardings
) -> Callable[..., Made]:
    return jax.jit(partial(make, *static), out_shardings=sharding)


def full(shape: tuple[int, ...], value: float) -> Array:
    """A float32 array of one value, to be given to `place`."""
    return jnp.full(shape, value, jnp.float32)


def _shape_at(shape: jax.ShapeDtypeStruct, sharding: Sharding | None) -> jax.ShapeDtypeStruct:
    return jax.ShapeDtypeStruct(shape.shape, shape.dtype, sharding=sharding)
