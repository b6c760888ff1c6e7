"""Blockwise attention on a mesh: whole rows, or rows whose positions are split over devices.

Where positions are split (`mesh.context`), every device gathers all keys and values. The queries
are redistributed, because under a causal mask later positions have more to do: each device gets
one part of every device's run of positions, so that all do the same amount of work.

Letters: `B` batch, `T` position, `N` query heads, `K` key/value heads, `H` head width.
"""

from __future__ import annotations

from functools import partial

import jax
import jax.numpy as jnp
from jax.sharding import Mesh, PartitionSpec
from jaxtyping import Array, Float

from droplora_jax.core.sharding import axis_size
from droplora_jax.nn.attention.blockwise import blockwise_attention
from droplora_jax.nn.attention.kernel import AttentionInputs
from droplora_jax.nn.attention.query_blocks import Layout, Visibility


def attention_on_mesh(inputs: AttentionInputs, mesh: Mesh | None = None) -> Float[Array, "B T N H"]:
    """`dispatch.attention` by XLA's own products, on any device and any mesh."""
    length = inputs.q_BTNH.shape[1]
    devices = 1 if mesh is None else axis_size(mesh, ("replica", "data", "fsdp", "tensor"))
    if mesh is None or not splits_positions(mesh, length):
        on_one_cpu = mesh is not None and mesh.size == 1 and mesh.devices.flat[0].platform == "cpu"
        layout = Layout(devices, separate_rows=on_one_cpu)
        segments = inputs.segment_ids_BT
        positions_T = jnp.arange(length, dtype=jnp.int32)
        seen = Visibility(positions_T, segments, segments, inputs.window)
        return blockwise_attention(layout, *inputs[:3], seen)
    split = PartitionSpec(None, "context")
    attend = jax.shard_map(
        partial(_attend_split, Layout(devices, runs=mesh.shape["context"])),
        mesh=mesh,
        in_specs=(AttentionInputs._make((split, split, split, split, PartitionSpec())),),
        out_specs=split,
        axis_names={"context"},
    )
    return attend(inputs)


def splits_positions(mesh: Mesh | None, length: int) -> bool:
    """Whether rows of this length are split over `context`, and their queries redistributed."""
    parts = 1 if mesh is None else mesh.shape["context"]
    return parts > 1 and length % parts**2 == 0


def _attend_split(layout: Layout, inputs: AttentionInputs) -> Float[Array, "B T N H"]:
    """On one device of `context`, which holds a run of T positions of every row."""
    runs, length = layout.runs, inputs.q_BTNH.shape[1]
    part = length // runs

    def redistribute(x: Array) -> Array:
        """[B, T, ...]: part c of every device's run goes to device c; applied twice, nothing."""
        parts = x.reshape(x.shape[0], runs, part, *x.shape[2:])
        return jax.lax.all_to_all(parts, "context", 1, 1, tiled=True).reshape(x.shape)

    def gather(x: Array) -> Array:
        return jax.lax.all_gather(x, "context", axis=1, tiled=True)

    first = jax.lax.axis_index("context") * part
    positions = first + jnp.arange(runs)[:, None] * length + jnp.arange(part)
    segment_ids_BT = inputs.segment_ids_BT
    query_segments = key_segments = None
    if segment_ids_BT is not None:
        query_segments, key_segments = redistribute(segment_ids_BT), gather(segment_ids_BT)
    y_BTNH = blockwise_attention(
        layout,
        redistribute(inputs.q_BTNH),
        gather(inputs.k_BTKH),
        gather(inputs.v_BTKH),
        Visibility(
            positions.reshape(-1).astype(jnp.int32), query_segments, key_segments, inputs.window
        ),
    )
    return redistribute(y_BTNH)
