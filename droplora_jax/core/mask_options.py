"""What a mask of ranks can be, as plain data: this module imports no JAX."""

from __future__ import annotations

from typing import Literal

Granularity = Literal["token", "sequence", "step"]
Sampler = Literal["bernoulli", "exact"]


def kept_ranks(rank: int, drop_rate: float) -> int:
    """How many ranks the `exact` sampler keeps: round((1 - p) * R)."""
    return round((1.0 - drop_rate) * rank)
