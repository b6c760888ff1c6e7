"""Lookup in a table that is split over a mesh, for tokens that are split too.

Letters: `B` batch, `T` position, `D` model width, `V` vocabulary.
"""

from __future__ import annotations

from dataclasses import dataclass
from functools import partial

import jax
import jax.numpy as jnp
from jax.sharding import Mesh
from jax.typing import DTypeLike
from jaxtyping import Array, Float, Int

from droplora_jax.core.sharding import divides, partition_spec


@dataclass(frozen=True)
class Lookup:
    """`embed` as an object that holds the mesh."""

    mesh: Mesh | None

    def __call__(
        self,
        table_VD: Float[Array, "V D"],
        tokens_BT: Int[Array, "B T"],
        dtype: DTypeLike | None = None,
    ) -> Float[Array, "B T D"]:
        return embed(table_VD, tokens_BT, self.mesh, dtype)


@jax.named_scope("embedding")
def embed(
    table_VD: Float[Array, "V D"],
    tokens_BT: Int[Array, "B T"],
    mesh: Mesh | None,
    dtype: DTypeLike | None = None,
) -> Float[Array, "B T D"]:
    """`table[tokens]` in `dtype` (default: the table's).

    On a mesh only the vectors that are needed are communicated, not the table: every device looks
    up its part of the width for all tokens of its group, and an all-to-all exchange gives each
    device the whole vectors of its own tokens. (The compiler by itself would gather the table on
    every device.)

    Vectors are cast before they are sent, so communication is in `dtype`; the gradient of the
    table is summed over positions in the table's own dtype.
    """
    dtype = jnp.dtype(table_VD.dtype if dtype is None else dtype)
    if mesh is None or mesh.size == 1 or not _splits(table_VD, tokens_BT, mesh):
        return jnp.take(table_VD, tokens_BT, axis=0).astype(dtype)
    width = partition_spec(("width",), mesh)[0]
    table = partition_spec(("vocab", "width"), mesh, table_VD.shape)
    tokens = partition_spec(("batch", "position"), mesh)
    lookup = jax.shard_map(
        partial(_lookup, width=width, vocab=table[0], dtype=dtype),
        mesh=mesh,
        in_specs=(table, tokens),
        out_specs=tokens,
    )
    return lookup(table_VD, tokens_BT)


def _splits(table_VD: Array, tokens_BT: Array, mesh: Mesh) -> bool:
    sizes = zip(("batch", "position", "width"), (*tokens_BT.shape, table_VD.shape[1]), strict=True)
    return all(divides(mesh, axis, size) for axis, size in sizes)


def _lookup(
    table_VD: Array,
    tokens_BT: Array,
    width: tuple[str, ...],
    vocab: str | tuple | None,
    dtype: jnp.dtype,
) -> Array:
    """On one device: its part of the table, its tokens."""
    tokens = jax.lax.all_gather(tokens_BT, width)  # [group, B, T]
    if vocab is None:
        vectors = jnp.take(table_VD, tokens, axis=0).astype(dtype)
    else:
        local = tokens - jax.lax.axis_index(vocab) * table_VD.shape[0]
        here = (local >= 0) & (local < table_VD.shape[0])
        vectors = jnp.take(table_VD, jnp.where(here, local, 0), axis=0).astype(dtype)
        vectors = jnp.where(here[..., None], vectors, 0)
    x_BTD = jax.lax.all_to_all(vectors, width, split_axis=0, concat_axis=3, tiled=True)[0]
    return x_BTD if vocab is None else jax.lax.psum(x_BTD, vocab)
