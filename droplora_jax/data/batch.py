"""What a step trains on; no library of data pipelines is imported here."""

from __future__ import annotations

from typing import TypedDict

import jax
import numpy as np
from jaxtyping import Int

IGNORE = -1  # a target without loss


class Batch(TypedDict):
    """Sequences of T tokens, int32: [G, T] on the host, [k, G / k, T] for a step of k microbatches.

    Attributes:
      tokens: 0 in padding.
      targets: the next token of the same document where that is trained, else `IGNORE`.
      segment_ids: 1, 2, ... for the documents of a sequence; 0 is padding.
    """

    tokens: Int[np.ndarray | jax.Array, "*batch T"]
    targets: Int[np.ndarray | jax.Array, "*batch T"]
    segment_ids: Int[np.ndarray | jax.Array, "*batch T"]
