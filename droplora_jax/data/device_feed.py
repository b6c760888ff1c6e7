"""Batches on a mesh: a process makes the sequences that its own devices hold, and no others."""

from __future__ import annotations

from functools import partial

import grain
import jax
import numpy as np
from jax.sharding import Mesh

from droplora_jax.core.sharding import named_sharding
from droplora_jax.data.batch import Batch
from droplora_jax.data.batches import Batches

# Making a batch takes milliseconds and a step far longer; the second thread covers a slow read.
_AHEAD = grain.ReadOptions(num_threads=2, prefetch_buffer_size=4)


def feed(
    batches: Batches,
    indices: grain.MapDataset[np.ndarray],
    mesh: Mesh,
    *,
    start: int = 0,
    microbatches: int | None = None,
) -> grain.DatasetIterator[Batch]:
    """Batches on the mesh, made ahead by threads, in order; to be closed.

    Args:
      batches: where the sequences come from.
      indices: those of each batch [G], such as `batches.indices` or `once(batches)`.
      mesh: a process makes the sequences of its own devices alone.
      start: the number of batches to skip, without making them.
      microbatches: k, to have arrays [k, G / k, T] instead of [G, T].
    """
    dataset = indices.map(partial(_split, microbatches)).map(partial(_placed, batches, mesh))
    iterator = iter(dataset.to_iter_dataset(_AHEAD))
    iterator.set_state({"next_index": start})
    return iterator


def once(batches: Batches) -> grain.MapDataset[np.ndarray]:
    """The indices of batches that hold every sequence once, in order."""
    return grain.MapDataset.source(batches.all_indices())


def place(batches: Batches, indices: np.ndarray, mesh: Mesh) -> Batch:
    """The sequences of some indices, as arrays [*indices.shape, T] on the mesh.

    The last axis of `indices` is split as examples are; those before it (microbatches) are not.
    """
    shape = (*indices.shape, batches.max_length)
    leading = [None] * (indices.ndim - 1)
    sharding = named_sharding(mesh, (*leading, "batch", "position"), shape)
    # Devices that split positions or copy weights hold the same sequences.
    parts: dict[bytes, Batch] = {}

    def part(name: str, index: tuple[slice, ...]) -> np.ndarray:
        local = np.ascontiguousarray(indices[index[:-1]])
        if (key := local.tobytes()) not in parts:
            parts[key] = batches.take(local.ravel())
        array = np.asarray(parts[key][name])  # type: ignore[literal-required]
        return array.reshape(*local.shape, -1)[..., index[-1]]

    def global_array(name: str) -> jax.Array:
        return jax.make_array_from_callback(shape, sharding, partial(part, name))

    return Batch(**{name: global_array(name) for name in Batch.__annotations__})  # type: ignore[typeddict-item]


def _split(microbatches: int | None, indices: np.ndarray) -> np.ndarray:
    indices = np.asarray(indices, np.int64)
    return indices if microbatches is None else indices.reshape(microbatches, -1)


def _placed(batches: Batches, mesh: Mesh, indices: np.ndarray) -> Batch:
    # Wait for the transfer: on CPUs it would otherwise be delayed and run beside the next program.
    return jax.block_until_ready(place(batches, indices, mesh))
