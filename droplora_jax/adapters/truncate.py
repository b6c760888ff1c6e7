"""An adapter of a smaller rank: the nearest of that rank, by the singular values of each delta."""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import TypeVar

import jax
import numpy as np
from flax import nnx

from droplora_jax.adapters.config import Branch, LowRank
from droplora_jax.adapters.droplora import DropLoRA
from droplora_jax.adapters.low_rank_layer import LowRankLinear
from droplora_jax.adapters.spectrum import singular_values, truncate
from droplora_jax.adapters.surgery import adapters_of, view
from droplora_jax.core.errors import InputError
from droplora_jax.core.mask_options import kept_ranks
from droplora_jax.nn.layer_paths import Path, layer_names

Model = TypeVar("Model", bound=nnx.Module)


@dataclass(frozen=True)
class Truncation:
    """How much is kept: shares of the sum of the squared singular values, the scale included.

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

    Every layer gets the same rank and scale 1: alpha is the rank, and layers of a smaller rank are
    padded with zeros. So vLLM serves the result of an adapter with patterns.

    Raises:
      InputError: a rank that is not smaller than the adapter's.
    """
    adapters = {p: a for p, a in adapters_of(model).items() if isinstance(a, LowRankLinear)}
    largest = max(adapter.rank for adapter in adapters.values())
    if not 0 < rank < largest:
        raise InputError(
            f"--rank {rank}: must be at least 1 and below the adapter's rank of {largest}"
        )
    config = next(iter(adapters.values())).config
    smaller = replace(
        _without_exact(config, rank),
        init="kaiming",  # the initial branch is in the factors now
        rank=rank,
        alpha=float(rank),
        rank_stabilized=False,
        rank_pattern={},
        alpha_pattern={},
    )
    energies: dict[str, tuple[float, float]] = {}  # kept, and in all

    def shrink(path: Path, node: object) -> object:
        if not isinstance(node, LowRankLinear):
            return node
        branches = tuple(Branch(rank * has, float(rank), 1.0 * has) for has in node.adapted)
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
    shares = {name: kept / total if total else 1.0 for name, (kept, total) in energies.items()}
    kept, total = (sum(column) for column in zip(*energies.values(), strict=True))
    worst = min(shares, key=shares.__getitem__)
    return model, Truncation(rank, kept / total if total else 1.0, (worst, shares[worst]))


def branches_of(adapter: LowRankLinear) -> dict[int, tuple[np.ndarray, np.ndarray]]:
    """A [I, r] and scale * B [r, O] of every layer of a stack that has a branch."""
    a_LIR, b_LRO = map(_by_layer, jax.device_get(adapter.factors()))
    ranks = map(adapter.ranks_of, range(len(adapter.branches)))
    return {
        i: (a_LIR[i][:, used], b_LRO[i][used].astype(np.float64) * branch.scale)
        for i, (used, branch) in enumerate(zip(ranks, adapter.branches, strict=True))
        if branch.rank
    }


def _by_layer(factor: np.ndarray) -> np.ndarray:
    """A view with an axis of layers, whether there is a stack or one layer."""
    return factor.reshape(-1, *factor.shape[-2:])


def _placed(value: np.ndarray, like: nnx.LoRAParam) -> jax.Array:
    sharding = like.get_value().sharding
    return jax.make_array_from_callback(value.shape, sharding, lambda i: value[i])


def _without_exact(config: LowRank, rank: int) -> LowRank:
    """A configuration that may have this rank: `exact` where it still keeps some of it."""
    if isinstance(config, DropLoRA) and config.sampler == "exact":
        rates = [config.drop_rate, *config.drop_rate_pattern.values()]
        if kept_ranks(rank, max(rates)) < 1:
            return replace(config, sampler="bernoulli")
    return config
