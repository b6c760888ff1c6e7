"""Layers that read the same input: the low-rank branches beside them share one product with it."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Protocol, runtime_checkable

from jaxtyping import Array, Float

from droplora_jax.lowrank import compress


@runtime_checkable
class LowRankBranch(Protocol):
    """A layer that takes `h = x @ A` from its caller; no `shared_factor` if it can't."""

    @property
    def shared_factor(self) -> Float[Array, "I R"] | None: ...

    def __call__(self, x: Array, *, h: Array) -> Array: ...


def apply_all(
    layers: Sequence[Callable[..., Array]], x: Float[Array, "... I"]
) -> list[Float[Array, "... O"]]:
    """`[layer(x) for layer in layers]`, reading `x` once for all their low-rank branches."""
    factors = {
        i: layer.shared_factor
        for i, layer in enumerate(layers)
        if isinstance(layer, LowRankBranch) and layer.shared_factor is not None
    }
    if len(factors) < 2:
        return [layer(x) for layer in layers]
    of_branches = dict(zip(factors, compress(x, *factors.values()), strict=True))
    return [
        layer(x, h=of_branches[i]) if i in of_branches else layer(x)
        for i, layer in enumerate(layers)
    ]
