"""Batches made ahead by threads, so that the accelerator does not wait for them."""

from __future__ import annotations

from functools import partial
from typing import Any

import grain
import jax
import numpy as np
from jax.sharding import Mesh

from droplora_jax.data.batches import Batches
from droplora_jax.data.placing import placed

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
