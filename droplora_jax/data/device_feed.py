"""Batches on a mesh: a process makes the lines that its own devices hold, and no others."""

from __future__ import annotations

from functools import partial
from typing import Any

import grain
import jax
import numpy as np
from jax.sharding import Mesh

from droplora_jax.core.sharding import named_sharding
from droplora_jax.data.batches import Batch, Batches


def placed(batches: Batches, lines: np.ndarray, mesh: Mesh) -> dict[str, jax.Array]:
    """The lines of some numbers, as arrays [*lines.shape, T] on the mesh.

    The last axis of `lines` is split as rows are; those before it (microbatches) are whole.
    """
    shape = (*lines.shape, batches.max_length)
    whole = [None] * (lines.ndim - 1)
    sharding = named_sharding(mesh, (*whole, "batch", "position"), shape)
    made: dict[bytes, Batch] = {}  # devices that split positions or copy weights share lines

    def part(name: str, index: tuple[slice, ...]) -> np.ndarray:
        own = np.ascontiguousarray(lines[index[:-1]])
        if (key := own.tobytes()) not in made:
            made[key] = batches.collate(own.ravel())
        array: Any = made[key][name]  # type: ignore[literal-required]
        return array.reshape(*own.shape, -1)[..., index[-1]]

    return {
        name: jax.make_array_from_callback(shape, sharding, partial(part, name))
        for name in Batch.__annotations__
    }


# Making a batch takes milliseconds and a step far longer: two threads see to an odd slow disk.
_AHEAD = grain.ReadOptions(num_threads=2, prefetch_buffer_size=4)


def fed(
    batches: Batches, numbers: grain.MapDataset[np.ndarray], mesh: Mesh, *, start: int = 0
) -> grain.DatasetIterator[dict[str, jax.Array]]:
    """The lines of each array of numbers, [*shape, T] on the mesh, in order; to be closed.

    Args:
      numbers: such as `batches.numbers`; a process makes the lines of its own devices alone.
      start: how many of them to skip, without making them.
    """
    made: Any = numbers.map(partial(_placed, batches, mesh))
    iterator = iter(made.to_iter_dataset(_AHEAD))
    iterator.set_state({"next_index": start})
    return iterator


def _placed(batches: Batches, mesh: Mesh, lines: np.ndarray) -> dict[str, jax.Array]:
    # Until they are there: on CPUs a step would else be put off, and run beside the next program.
    return jax.block_until_ready(placed(batches, np.asarray(lines, np.int64), mesh))
