"""A check of arrays for NaN and infinity."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

import jax
import jax.numpy as jnp

from droplora_jax.core import distributed


def not_finite(arrays: Mapping[str, jax.Array]) -> list[str]:
    """The names of the arrays that hold a value which is not finite, in order.

    One reduction on the devices, and one transfer of a bool for each array. When several
    processes share a run, all of them have to call it, and all get the same answer.
    """
    numbers = {name: x for name, x in arrays.items() if jnp.issubdtype(x.dtype, jnp.inexact)}
    finite = distributed.to_host(_all_finite(list(numbers.values())))
    return [name for name, good in zip(numbers, finite, strict=True) if not good]


@jax.jit
def _all_finite(arrays: Sequence[jax.Array]) -> jax.Array:
    return jnp.array([jnp.isfinite(x).all() for x in arrays])
