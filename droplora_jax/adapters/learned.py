"""The options of learned masks."""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar, Literal

from droplora_jax.adapters.config import LowRank


@dataclass(frozen=True)
class Learned(LowRank):
    """A branch that learns which of its ranks to keep; the options of `LowRank`.

    The dynamic pruning of the authors of arXiv 2508.17337, but training, evaluation, merge and
    export are one function. Nothing is random, so it has no `drop_rate`.

    >>> import droplora_jax as dl
    >>> dl.Learned(rank=16).kind
    'learned'
    """

    layer: ClassVar[str] = "droplora_jax.adapters.learned_layer:LearnedLinear"

    kind: Literal["learned"] = "learned"  # type: ignore[assignment]
