"""Embedding and head of a decoder: tokens to vectors, with noise in training; vectors to logits.

Letters: `B` batch, `T` position, `D` width, `V` vocabulary.
"""

from __future__ import annotations

import math

import jax
import jax.numpy as jnp
from flax import nnx
from jax.sharding import Mesh
from jax.typing import DTypeLike
from jaxtyping import Array, Float, Int

from droplora_jax.core import prng
from droplora_jax.nn import ops
from droplora_jax.nn.embedding import Lookup
from droplora_jax.nn.linear_spec import LinearSpec, linear_spec
from droplora_jax.nn.mask_keys import MaskKey, checked_rows


class Head(nnx.Module):
    """The output projection."""

    def __init__(self, kernel_DV: Float[Array, "D V"]) -> None:
        self.kernel = nnx.Param(kernel_DV)

    def __call__(self, x_BTD: Float[Array, "B T D"]) -> Float[Array, "B T V"]:
        return ops.matmul(x_BTD, self.kernel[...])


class Embedding(nnx.Module):
    """The vectors of tokens, in `dtype`, also if the table is trained in another dtype.

    A `tied` table is also the model's head.
    """

    def __init__(
        self, table_VD: Float[Array, "V D"], *, dtype: DTypeLike, mesh: Mesh | None, tied: bool
    ) -> None:
        self.embedding = nnx.Param(table_VD)
        self.dtype, self.lookup, self.tied = jnp.dtype(dtype), Lookup(mesh), tied

    def __call__(self, tokens_BT: Int[Array, "B T"]) -> Float[Array, "B T D"]:
        return self.lookup(self.embedding[...], tokens_BT, self.dtype)

    def transposed(self) -> Head:
        """The head of a model with tied embeddings."""
        return Head(self.embedding[...].T)


@linear_spec.register(Head)
def _head(layer: Head) -> LinearSpec:
    return LinearSpec("...i", "io", "...o")


@linear_spec.register(Embedding)
def _embedding(layer: Embedding) -> LinearSpec:
    return LinearSpec(
        "...i", "io", "...o", attribute="embedding", lookup=layer.lookup, tied=layer.tied
    )


class Noise(nnx.Module):
    """NEFTune (arXiv 2310.05914): in training, noise on the vectors of the tokens.

    The noise is uniform in +-alpha / sqrt(L * D). L is the length of the position's own document,
    so that padding and packing change nothing. `droplora_jax.draw` turns it on, as it does masks.
    """

    def __init__(self, alpha: float) -> None:
        self.alpha = alpha
        self.mask_key = MaskKey(prng.root_key(0)[None][:0], stack=(), granularity="token")

    @jax.named_scope("embedding")
    def __call__(
        self, x_BTD: Float[Array, "B T D"], segment_ids_BT: Int[Array, "B T"]
    ) -> Float[Array, "B T D"]:
        keys_B = self.mask_key[...]
        if keys_B.size == 0:
            return x_BTD
        keys_B, shape = checked_rows(keys_B, x_BTD), x_BTD.shape[1:]
        uniform_BTD = jax.vmap(lambda key: jax.random.uniform(key, shape, minval=-1.0))(keys_B)
        lengths_BT = ops.lengths_of_segments(segment_ids_BT).astype(jnp.float32)
        bound_BT = self.alpha / jnp.sqrt(lengths_BT * float(shape[-1]))
        return x_BTD + (uniform_BTD * bound_BT[..., None]).astype(x_BTD.dtype)


def normal(rngs: nnx.Rngs, rows: int, columns: int, width: int, dtype: DTypeLike) -> Array:
    """The initial table or kernel of a model that is not loaded: normal, 1 / sqrt(width)."""
    return nnx.initializers.normal(1 / math.sqrt(width))(rngs.params(), (rows, columns), dtype)
