"""The keys that a step's masks are drawn from: variables of a model that only `draw` fills."""

from __future__ import annotations

from flax import nnx
from jaxtyping import Array

from droplora_jax.core.errors import InputError


class MaskKey(nnx.Variable):
    """The keys of one adapter's rank mask, [*stack, n]; n = 0 means no mask (evaluation).

    Filled for one step by `droplora_jax.draw`. Its metadata: `stack`, the leading axes of stacked
    layers, and `granularity`, None where the adapter never draws.
    """


class DropShare(MaskKey):
    """What share of its drop rate an adapter has in this step, [*stack], where that changes.

    Filled for one step by `droplora_jax.draw` too.
    """


def checked_rows(keys: Array, x: Array) -> Array:
    """Keys of a mask that differs by row, one for each row of x."""
    if keys.shape[0] != x.shape[0]:
        raise InputError(
            f"the masks were drawn for {keys.shape[0]} rows, but this layer sees {x.shape[0]}: "
            "pass draw(rows=...) one index for every row of the batch"
        )
    return keys
