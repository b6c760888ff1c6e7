"""What a model may ask of adapted layers without knowing any adapter.

Layers that read the same input share one product `x @ [A1, A2, ...]` of their branches. A head's
branch can be computed in two halves, for a loss that handles a few positions at a time.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Protocol, runtime_checkable

from jax.typing import DTypeLike
from jaxtyping import Array, Float

from droplora_jax.lowrank import compress


@runtime_checkable
class LowRankBranch(Protocol):
    """A layer that can take `h = x @ A` from its caller; `shared_factor` is A, or None."""

    @property
    def shared_factor(self) -> Float[Array, "I R"] | None: ...

    def __call__(self, x: Array, *, h: Array) -> Array: ...


@runtime_checkable
class Halves(Protocol):
    """A layer that is `ending()(base(x), hidden(x, dtype))`.

    `hidden` needs all positions, each in its place, because masks depend on the position; the
    function that `ending` returns may be given any subset of positions.
    """

    @property
    def base(self) -> Callable[[Array], Array]: ...

    def hidden(self, x: Array, dtype: DTypeLike) -> Array: ...

    def ending(self) -> Callable[[Array, Array], Array]: ...


def apply_all(
    layers: Sequence[Callable[..., Array]], x: Float[Array, "... I"]
) -> list[Float[Array, "... O"]]:
    """`[layer(x) for layer in layers]`, with one product of `x` for all their low-rank branches."""
    factors = {
        i: layer.shared_factor
        for i, layer in enumerate(layers)
        if isinstance(layer, LowRankBranch) and layer.shared_factor is not None
    }
    if len(factors) < 2:
        return [layer(x) for layer in layers]
    hidden = dict(zip(factors, compress(x, *factors.values()), strict=True))
    return [layer(x, h=hidden[i]) if i in hidden else layer(x) for i, layer in enumerate(layers)]
