"""The variables of a model that hold the keys of a step's masks; only `draw` fills them."""

from __future__ import annotations

from flax import nnx
from jaxtyping import Array

from droplora_jax.core.errors import InputError


class MaskKey(nnx.Variable):
    """The keys of one adapter's rank mask, [*stack, n]; n = 0 means no mask (evaluation).

    `droplora_jax.draw` fills it for one step. Metadata: `stack`, the leading axes of stacked
    layers; `granularity`, None if the adapter draws no mask.
    """


class DropShare(MaskKey):
    """The factor on an adapter's drop rate in this step, [*stack], if the rate changes by step.

    `droplora_jax.draw` fills it for one step, too.
    """


def checked_rows(keys: Array, x: Array) -> Array:
    """`keys`, if there is one for each row of x.

    Raises:
      InputError: the masks were drawn for another number of rows.
    """
    if keys.shape[0] != x.shape[0]:
        raise InputError(
            f"the masks were drawn for {keys.shape[0]} rows, but this layer sees {x.shape[0]}: "
            "pass draw(rows=...) one index for every row of the batch"
        )
    return keys
