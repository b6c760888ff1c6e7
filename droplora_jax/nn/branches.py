"""What a model may ask of adapted layers without knowing any adapter.

Layers that read the same input share one product `x @ [A1, A2, ...]` of their branches. A head's
branch can be computed in two halves, for a loss that handles a few positions at a time.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import NamedTuple, Protocol, runtime_checkable

from jax.typing import DTypeLike
from jaxtyping import Array, Float

from droplora_jax.lowrank import compress


class ActiveFactors(NamedTuple):
    """What a branch computes with in one call: `x @ a`, times `mask`, times `b`.

    Attributes:
      a, b: the factors; or only the ranks that a step keeps, where they are the same for all
        positions. Initial factors that are subtracted follow, with `b` negated.
      mask: [K], of the ranks in `a`, where it is known already; None: it depends on the position,
        or there is none.
    """

    a: Float[Array, "..."]
    b: Float[Array, "..."]
    mask: Float[Array, "K"] | None


@runtime_checkable
class LowRankBranch(Protocol):
    """A layer whose product `h = x @ a` its caller may make, together with other layers'.

    `shares_input` says whether it may: `a` is a matrix [I, R], and the branch reads x as it is.
    """

    @property
    def shares_input(self) -> bool: ...

    def active_factors(self, dtype: DTypeLike) -> ActiveFactors: ...

    def __call__(self, x: Array, *, active: ActiveFactors, h: Array) -> Array: ...


@runtime_checkable
class Halves(Protocol):
    """A layer that is `end(base(x), hidden(x))`, with `hidden, end = halves(dtype)`.

    `hidden` needs all positions, each in its place, because masks depend on the position; its
    result has this dtype. `end` may be given any subset of positions, any number of times.
    """

    @property
    def base(self) -> Callable[[Array], Array]: ...

    def halves(
        self, dtype: DTypeLike
    ) -> tuple[Callable[[Array], Array], Callable[[Array, Array], Array]]: ...


def apply_all(
    layers: Sequence[Callable[..., Array]], x: Float[Array, "... I"]
) -> list[Float[Array, "... O"]]:
    """`[layer(x) for layer in layers]`, with one product of `x` for all their low-rank branches."""
    sharing = {
        i: layer
        for i, layer in enumerate(layers)
        if isinstance(layer, LowRankBranch) and layer.shares_input
    }
    if len(sharing) < 2:
        return [layer(x) for layer in layers]
    active = {i: layer.active_factors(x.dtype) for i, layer in sharing.items()}
    hidden = compress(x, *(factors.a for factors in active.values()))
    h = dict(zip(sharing, hidden, strict=True))
    return [
        layer(x, active=active[i], h=h[i]) if i in sharing else layer(x)
        for i, layer in enumerate(layers)
    ]
