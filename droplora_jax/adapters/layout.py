"""The shapes of an adapter's arrays, and where they lie: as the kernel beside them does."""

from __future__ import annotations

from collections.abc import Callable, Hashable
from functools import lru_cache, partial
from typing import Any

import jax
import jax.numpy as jnp
from jax.sharding import NamedSharding, PartitionSpec
from jaxtyping import Array

from droplora_jax.core.sharding import RULES, axis_size
from droplora_jax.nn.linear_spec import LinearSpec


def factor_shardings(kernel: Any, spec: LinearSpec) -> tuple[Any, Any]:
    """Where A and B lie: A as the kernel's input dimensions, B as its output dimensions.

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


def _names(entry: Any) -> tuple[str, ...]:
    if entry is None:
        return ()
    return (entry,) if isinstance(entry, str) else tuple(entry)


def letters_sharding(kernel: Any, spec: LinearSpec, letters: str) -> Any:
    """Where an array of some of the kernel's letters lies: as the kernel does."""
    if (layout := _layout(kernel, spec)) is None:
        return None
    mesh, stack, by_letter = layout
    return NamedSharding(mesh, PartitionSpec(*stack, *map(by_letter.get, letters)))


def _layout(kernel: Any, spec: LinearSpec) -> tuple[Any, list[Any], dict[str, Any]] | None:
    """A kernel's mesh, and the mesh axes of its stack and of its letters; None without a mesh."""
    sharding = getattr(kernel, "sharding", None)
    if not isinstance(sharding, NamedSharding):
        return None
    entries = [*sharding.spec, *[None] * (kernel.ndim - len(sharding.spec))]
    stack = len(spec.stack(kernel))
    return sharding.mesh, entries[:stack], dict(zip(spec.kernel, entries[stack:], strict=True))


def letters_shape(kernel: Any, spec: LinearSpec, letters: str, **sizes: int) -> tuple[int, ...]:
    """The shape of an array of some letters, stack axes in front; `sizes` of further letters."""
    stack = spec.stack(kernel)
    sizes |= dict(zip(spec.kernel, kernel.shape[len(stack) :], strict=True))
    return stack + tuple(sizes[c] for c in letters)


def factor_shapes(
    kernel: Any, spec: LinearSpec, rank: int
) -> tuple[tuple[int, ...], tuple[int, ...]]:
    """The shapes of A and B for one kernel, stack axes in front."""
    of_a, of_b = (
        letters_shape(kernel, spec, letters, **{spec.rank: rank}) for letters in (spec.a, spec.b)
    )
    return of_a, of_b


def place(
    make: Callable[..., Any],
    static: tuple[Hashable, ...],
    sharding: Any,
    *arguments: Any,
    abstract: bool = False,
) -> Any:
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
        if isinstance(shapes, tuple):
            return tuple(map(_shape_at, shapes, sharding))
        return _shape_at(shapes, sharding)
    return _program(make, static, sharding)(*arguments)


@lru_cache(maxsize=256)
def _program(make: Callable[..., Any], static: tuple[Hashable, ...], sharding: Any) -> Any:
    return jax.jit(partial(make, *static), out_shardings=sharding)


def full(shape: tuple[int, ...], value: float) -> Array:
    """A float32 array of one value, to be given to `place`."""
    return jnp.full(shape, value, jnp.float32)


def _shape_at(shape: Any, sharding: Any) -> jax.ShapeDtypeStruct:
    return jax.ShapeDtypeStruct(shape.shape, shape.dtype, sharding=sharding)
