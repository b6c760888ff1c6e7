"""Examples that are held out for validation."""

from __future__ import annotations

import numpy as np

from droplora_jax.core.errors import InputError
from droplora_jax.data.rows import Rows


def held_out(rows: Rows, fraction: float, seed: int) -> tuple[Rows, Rows]:
    """Splits rows into training and validation rows.

    The side of a row depends on the seed and on its content, not on its place: equal rows, and the
    pieces of one text, are on the same side, wherever they stand in a file or between files.

    Args:
      rows: all examples.
      fraction: the part of them to hold out, above 0 and below 1.
      seed: another seed holds out other rows.

    Raises:
      InputError: one side would be empty, or a source would have nothing left to train on.
    """
    marks = mixed(rows.keys, seed)
    count = round(fraction * len(rows))
    if not count:
        raise InputError(
            f"data.valid_fraction={fraction} of {len(rows)} rows is none; raise it, or set it to "
            "null"
        )
    out = marks <= np.partition(marks, count - 1)[count - 1]
    train, valid = rows.only(np.flatnonzero(~out)), rows.only(np.flatnonzero(out))
    if not all(train.counts):
        raise InputError(
            f"data.valid_fraction={fraction}: of {rows.counts} rows of the sources, "
            f"{valid.counts} would be held out and too few left (equal rows are kept together)"
        )
    return train, valid


def mixed(keys: np.ndarray, seed: int) -> np.ndarray:
    """uint64 [n]: hashes of the keys with a seed (the finalizer of SplitMix64)."""
    word = np.random.SeedSequence(seed).generate_state(1, np.uint64)[0]
    with np.errstate(over="ignore"):
        x = keys + word
        x = (x ^ (x >> np.uint64(30))) * np.uint64(0xBF58476D1CE4E5B9)
        x = (x ^ (x >> np.uint64(27))) * np.uint64(0x94D049BB133111EB)
        return x ^ (x >> np.uint64(31))
