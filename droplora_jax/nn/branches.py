"""What low-rank branches offer to a model that knows no adapter.

Layers that read the same input share one product of their branches with it; and a head's branch
comes in two halves, for a loss that takes a few positions at a time.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any, Protocol, runtime_checkable

from jaxtyping import Array, Float

from droplora_jax.lowrank import compress


@runtime_checkable
class LowRankBranch(Protocol):
    """A layer that takes `h = x @ A` from its caller; no `shared_factor` if it can't."""

    @property
    def shared_factor(self) -> Float[Array, "I R"] | None: ...

    def __call__(self, x: Array, *, h: Array) -> Array: ...


@runtime_checkable
class Halves(Protocol):
    """A layer that is `ending()(base(x), hidden(x, dtype))`.

    `hidden` has to see all positions, each in its place; the rest may see any of them.
    """

    @property
    def base(self) -> Callable[[Array], Array]: ...

    def hidden(self, x: Array, dtype: Any) -> Array: ...

    def ending(self) -> Callable[[Array, Array], Array]: ...


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
