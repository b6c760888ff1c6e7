"""Batches on a mesh: a process makes the lines that its own devices hold, and no others."""

from __future__ import annotations

from functools import partial
from typing import Any

import jax
import numpy as np
from jax.sharding import Mesh

from droplora_jax.data.batches import Batch, Batches
from droplora_jax.sharding import named_sharding


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
