"""Blockwise attention over whole rows, or over rows whose positions lie on several devices.

Where positions are split (`context`), keys and values are gathered, and the queries are dealt out:
of every device's run of positions each device gets a part, so that all have the same to do.

Letters: `B` batch, `T` position, `N` query heads, `K` key/value heads, `H` head width.
"""

from __future__ import annotations

from functools import partial

import jax
import jax.numpy as jnp
from jax.sharding import Mesh, PartitionSpec
from jaxtyping import Array, Float, Int

from droplora_jax.core.sharding import axis_size
from droplora_jax.nn.attention.blockwise import blockwise_attention
from droplora_jax.nn.attention.query_blocks import Layout


def dealt_attention(
    q_BTNH: Float[Array, "B T N H"],
    k_BTKH: Float[Array, "B T K H"],
    v_BTKH: Float[Array, "B T K H"],
    segment_ids_BT: Int[Array, "B T"] | None,
    window: Int[Array, ""] | None,
    *,
    mesh: Mesh | None = None,
) -> Float[Array, "B T N H"]:
    """`attention.attention` by XLA's own products, on any device and any mesh."""
    length = q_BTNH.shape[1]
    devices = 1 if mesh is None else axis_size(mesh, ("replica", "data", "fsdp", "tensor"))
    if mesh is None or not deals(mesh, length):
        positions_T = jnp.arange(length, dtype=jnp.int32)
        segments = (segment_ids_BT, segment_ids_BT)
        arguments = (q_BTNH, k_BTKH, v_BTKH, positions_T, *segments, window)
        apart = mesh is not None and mesh.size == 1 and mesh.devices.flat[0].platform == "cpu"
        return blockwise_attention(Layout(devices, apart=apart), *arguments)
    split = PartitionSpec(None, "context")
    dealt = jax.shard_map(
        partial(_dealt, Layout(devices, runs=mesh.shape["context"])),
        mesh=mesh,
        in_specs=(split, split, split, split, PartitionSpec()),
        out_specs=split,
        axis_names={"context"},
    )
    return dealt(q_BTNH, k_BTKH, v_BTKH, segment_ids_BT, window)


def deals(mesh: Mesh | None, length: int) -> bool:
    """Whether rows of this length are split over `context`, and their queries dealt out."""
    parts = 1 if mesh is None else mesh.shape["context"]
    return parts > 1 and length % parts**2 == 0


def _dealt(
    layout: Layout,
    q_BTNH: Array,
    k_BTKH: Array,
    v_BTKH: Array,
    segment_ids_BT: Array | None,
    window: Array | None,
) -> Array:
    """On one device of `context`, with its run of T positions."""
    runs, length = layout.runs, q_BTNH.shape[1]
    part = length // runs

    def deal(x: Array) -> Array:
        """[B, T, ...]: the c-th part of every device's run goes to device c; the same, back."""
        parts = x.reshape(x.shape[0], runs, part, *x.shape[2:])
        return jax.lax.all_to_all(parts, "context", 1, 1, tiled=True).reshape(x.shape)

    def gather(x: Array) -> Array:
        return jax.lax.all_gather(x, "context", axis=1, tiled=True)

    first = jax.lax.axis_index("context") * part
    positions = first + jnp.arange(runs)[:, None] * length + jnp.arange(part)
    segments: tuple[Array | None, Array | None] = (None, None)
    if segment_ids_BT is not None:
        segments = (deal(segment_ids_BT), gather(segment_ids_BT))
    y_BTNH = blockwise_attention(
        layout,
        deal(q_BTNH),
        gather(k_BTKH),
        gather(v_BTKH),
        positions.reshape(-1).astype(jnp.int32),
        *segments,
        window,
    )
    return deal(y_BTNH)
