"""Checksums of the arrays of a checkpoint."""

from __future__ import annotations

from collections.abc import Mapping

import jax
import numpy as np

from droplora_jax.core import distributed


def digests(flat: Mapping[str, jax.Array]) -> dict[str, int]:
    """A checksum of each array, which differs if a bit of the array does.

    It is the sum of the elements' bits, each weighted by its index. Unlike a hash it is the same on
    any mesh: every process adds up its own shards.
    """
    shard_sums = [
        sum(_digest(part, x.shape) for part in x.addressable_shards if part.replica_id == 0)
        for x in flat.values()
    ]
    total = distributed.sum_of_all(np.array(shard_sums, np.uint64))
    return {name: int(number) % 2**32 for name, number in zip(flat, total, strict=True)}


def _digest(part: jax.Shard, shape: tuple[int, ...]) -> int:
    x = np.asarray(part.data)
    bits = x.view(f"uint{8 * x.dtype.itemsize}").astype(np.uint32)
    place = np.zeros((), np.uint32)
    with np.errstate(over="ignore"):
        for index, size in zip(part.index, shape, strict=True):
            here = np.arange(*index.indices(size), dtype=np.uint32)
            place = place[..., None] * np.uint32(size) + here
        return int(np.sum(bits * (2 * place + np.uint32(1)), dtype=np.uint32))
