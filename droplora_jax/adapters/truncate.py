"""An adapter of a smaller rank: of every delta, what its largest singular values make of it."""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import Any, TypeVar

import jax
import numpy as np
from flax import nnx

from droplora_jax.adapters.config import Branch
from droplora_jax.adapters.droplora import DropLoRA
from droplora_jax.adapters.low_rank import LowRankLinear
from droplora_jax.adapters.spectrum import singular_values, truncate
from droplora_jax.adapters.surgery import adapters_of, view
from droplora_jax.core.errors import InputError
from droplora_jax.core.mask_options import kept_ranks
from droplora_jax.nn.layer_paths import Path, layer_names

Model = TypeVar("Model", bound=nnx.Module)


@dataclass(frozen=True)
class Truncation:
    """What is left: shares of the sum of the squared singular values, the scale included.

    Attributes:
      kept: of all adapters together.
      worst: the layer that keeps least, and its share.
    """

    rank: int
    kept: float
    worst: tuple[str, float]

    def __str__(self) -> str:
        name, share = self.worst
        return (
            f"rank {self.rank} keeps {self.kept:.2%} of the adapter's energy (sum of squared "
            f"singular values); least in {name}: {share:.2%}"
        )


def truncated(model: Model, rank: int) -> tuple[Model, Truncation]:
    """A view of `model` whose adapters have this rank, and what they keep.

    Every layer gets the same rank and scale 1, whatever its own were: alpha is the rank, and what
    has fewer ranks is padded with zeros. So vLLM serves the result of an adapter with patterns.

    Raises:
      InputError: a rank that is not smaller than the adapter's.
    """
    adapters: dict[str, Any] = adapters_of(model)
    largest = max(adapter.rank for adapter in adapters.values())
    if not 0 < rank < largest:
        raise InputError(
            f"--rank {rank}: must be at least 1 and below the adapter's rank of {largest}"
        )
    config = next(iter(adapters.values())).config
    smaller = replace(
        _without_exact(config, rank),
        init="kaiming",  # not measured from its start any more
        rank=rank,
        alpha=float(rank),
        rank_stabilized=False,
        rank_pattern={},
        alpha_pattern={},
    )
    energies: dict[str, tuple[float, float]] = {}  # kept, and there

    def shrink(path: Path, node: Any) -> Any:
        if not isinstance(node, LowRankLinear):
            return node
        branches = tuple(Branch(rank * there, float(rank), 1.0 * there) for there in node.adapted)
        layer = type(node)(node.base, node.spec, smaller, branches, "later")
        factors = [np.zeros(p.shape, np.float32) for p in (layer.lora_a, layer.lora_b)]
        of_layers = [_by_layer(factor) for factor in factors]
        for i, (a_IR, b_RO) in branches_of(node).items():
            values = singular_values(a_IR, b_RO)
            name = layer_names(path, node.stack)[i][-1]
            energies[name] = (float(sum(values[:rank] ** 2)), float(sum(values**2)))
            of_layers[0][i], of_layers[1][i] = truncate(a_IR, b_RO, rank)
        placed = map(_placed, factors, (layer.lora_a, layer.lora_b))
        layer.fill({**node.stored(), **dict(zip(("lora_a", "lora_b"), placed, strict=True))})
        return layer

    model = nnx.recursive_map(shrink, view(model))
    shares = {name: kept / there if there else 1.0 for name, (kept, there) in energies.items()}
    kept, there = (sum(column) for column in zip(*energies.values(), strict=True))
    worst = min(shares, key=shares.__getitem__)
    return model, Truncation(rank, kept / there if there else 1.0, (worst, shares[worst]))


def branches_of(adapter: LowRankLinear) -> dict[int, tuple[np.ndarray, np.ndarray]]:
    """A [I, r] and scale * B [r, O] of every layer of a stack that has a branch."""
    a_LIR, b_LRO = map(_by_layer, jax.device_get(adapter.factors()))
    ranks = map(adapter.ranks_of, range(len(adapter.branches)))
    return {
        i: (a_LIR[i][:, own], b_LRO[i][own].astype(np.float64) * branch.scale)
        for i, (own, branch) in enumerate(zip(ranks, adapter.branches, strict=True))
        if branch.rank
    }


def _by_layer(factor: np.ndarray) -> np.ndarray:
    """A view with an axis of layers, whether there is a stack or one layer."""
    return factor.reshape(-1, *factor.shape[-2:])


def _placed(value: np.ndarray, like: nnx.LoRAParam) -> jax.Array:
    sharding = like.get_value().sharding
    return jax.make_array_from_callback(value.shape, sharding, lambda i: value[i])


def _without_exact(config: Any, rank: int) -> Any:
    """A configuration that may have this rank: `exact` where it still keeps some of it."""
    if isinstance(config, DropLoRA) and config.sampler == "exact":
        rates = [config.drop_rate, *config.drop_rate_pattern.values()]
        if kept_ranks(rank, max(rates)) < 1:
            return replace(config, sampler="bernoulli")
    return config
