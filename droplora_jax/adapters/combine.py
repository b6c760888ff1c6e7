"""Several adapters on one base, and their weighted sum as one adapter.

Models that `inject` or `load_adapter` made of one base share its arrays, so a dictionary of them is
all that it takes to keep several by name, to use one or another, and to train one while the others
stay as they are.
"""

from __future__ import annotations

import math
import re
from collections.abc import Mapping, Sequence
from typing import TypeVar

import jax
import numpy as np
from flax import nnx

from droplora_jax.adapters.base import Adapter
from droplora_jax.adapters.config import Branch
from droplora_jax.adapters.dora_layer import DoRALinear
from droplora_jax.adapters.droplora import DropLoRA
from droplora_jax.adapters.droplora_layer import DropLoRALinear
from droplora_jax.adapters.fully_trained import wholes_of
from droplora_jax.adapters.low_rank_layer import LowRankLinear
from droplora_jax.adapters.surgery import adapters_of, view
from droplora_jax.core.errors import InputError
from droplora_jax.nn.layer_paths import Path, dotted, layer_names

Model = TypeVar("Model", bound=nnx.Module)
Weighted = list[tuple[LowRankLinear, float]]  # the adapters of one layer


def combine(models: Mapping[str, Model], weights: Mapping[str, float] | None = None) -> Model:
    """One model whose adapter is the sum of others', each times its weight; exactly, by rank.

    It is a LoRA (`drop_rate=0`) that can be used, trained on, merged and saved as any other. Its
    rank is the sum of the others': `save_adapter` reports the resulting rank and
    `droplora export --rank` reduces it.

    Args:
      models: by name, with adapters on one base. They share its arrays with what is returned.
      weights: by name, of each; default: 1.

    Raises:
      InputError: a name or a weight that is none, models that do not share a base, or an adapter
        whose effect is no sum: DoRA, or parameters that are trained whole.

    >>> import droplora_jax as dl
    >>> layers = [nnx.Linear(4, 4, rngs=nnx.Rngs(i)) for i in range(2)]
    >>> model = nnx.Sequential(layers[0], nnx.relu, layers[1])
    >>> config = dl.DropLoRA(rank=2, targets="all-linear")
    >>> adapted = dl.inject(model, config, key=dl.root_key(0))
    >>> both = dl.combine({"one": adapted, "other": adapted}, {"one": 1.0, "other": 0.5})
    >>> both.layers[0].rank  # side by side
    4
    """
    weights = dict.fromkeys(models, 1.0) if weights is None else weights
    _check(models, weights)
    parts: dict[str, Weighted] = {}
    for name, model in models.items():
        for path, adapter in adapters_of(model).items():
            parts.setdefault(path, []).append((_adds_up(name, path, adapter), weights[name]))
    _check_one_base(parts, models)
    ranks = {path: _ranks(of_path) for path, of_path in parts.items()}
    config = _config(ranks)

    def wrap(path: Path, node: object) -> object:
        if dotted(path) not in parts or not isinstance(node, nnx.Module):
            return node
        base = node.base if isinstance(node, LowRankLinear) else node
        return _summed(base, config, parts[dotted(path)], ranks[dotted(path)])

    return nnx.recursive_map(wrap, view(next(iter(models.values()))))


def _check(models: Mapping[str, nnx.Module], weights: Mapping[str, float]) -> None:
    if not models:
        raise InputError("combine: no models are given")
    for name in models.keys() ^ weights.keys():
        raise InputError(
            f"combine: {name!r} has {'no weight' if name in models else 'a weight and no model'}; "
            f"the models are {', '.join(map(repr, models))}"
        )
    for name, weight in weights.items():
        if not math.isfinite(weight):
            raise InputError(f"combine: the weight of {name!r} is {weight}; it must be finite")
    for name, model in models.items():
        if not adapters_of(model):
            raise InputError(f"combine: {name!r} has no adapters; leave it out")
        if wholes := wholes_of(model):
            raise InputError(
                f"combine: {name!r} trains {dotted(next(iter(wholes)))} whole, which can't be "
                "added to what others make of it; merge(model) gives a base that has it"
            )


def _adds_up(name: str, path: str, adapter: Adapter) -> LowRankLinear:
    if isinstance(adapter, DoRALinear) or not isinstance(adapter, LowRankLinear):
        raise InputError(
            f"combine: {name!r} is {adapter.config.kind} ({path}), whose effect is no sum; "
            "merge(model) gives a base that has it"
        )
    return adapter


def _check_one_base(parts: Mapping[str, Weighted], models: Mapping[str, nnx.Module]) -> None:
    for path, of_path in parts.items():
        # (A quantised kernel is several arrays.)
        first, *others = (
            jax.tree.leaves(adapter.base_kernel.get_value()) for adapter, _ in of_path
        )
        for kernel in others:
            if len(kernel) != len(first) or not all(map(_is_one, kernel, first)):
                raise InputError(
                    f"combine: {', '.join(map(repr, models))} do not share a base ({path} is "
                    "another array): load it once, and put every adapter on it"
                )


def _is_one(x: object, y: object) -> bool:
    """Whether two arrays are the same object; shapes without values need only be equal."""
    return x is y or (isinstance(x, jax.ShapeDtypeStruct) and x == y)


def _ranks(parts: Weighted) -> list[int]:
    """The ranks of the sum, for every layer of a stack."""
    layers = range(len(parts[0][0].branches))
    return [sum(len(adapter.ranks_of(layer)) for adapter, _ in parts) for layer in layers]


def _config(ranks: Mapping[str, Sequence[int]]) -> DropLoRA:
    """A configuration that makes branches of these ranks, with scale 1.

    A pattern for each layer that differs from the largest: patterns are how a configuration is
    written to YAML and JSON, and a table of branches beside them would be a second way.
    """
    largest = max(map(max, ranks.values()))
    by_layer = [
        (rf"^{re.escape(name)}$", rank)
        for path, of_path in ranks.items()
        for name, rank in zip(_names(path, len(of_path)), of_path, strict=True)
    ]
    patterns = {pattern: rank for pattern, rank in by_layer if 0 < rank < largest}
    return DropLoRA(
        rank=largest,
        alpha=float(largest),
        drop_rate=0.0,
        targets=tuple(rf"^{re.escape(path)}$" for path in ranks),
        exclude=tuple(pattern for pattern, rank in by_layer if not rank),
        rank_pattern=patterns,
        alpha_pattern={pattern: float(rank) for pattern, rank in patterns.items()},
    )


def _names(path: str, layers: int) -> list[str]:
    """The name of every layer at a path."""
    stack = (layers,) if layers > 1 else ()
    return [names[-1] for names in layer_names(tuple(path.split(".")), stack)]


def _summed(
    base: nnx.Module, config: DropLoRA, parts: Weighted, ranks: Sequence[int]
) -> LowRankLinear:
    """The layer at one path: in every layer of its stack, the ranks of all parts side by side."""
    branches = tuple(Branch(rank, float(rank), float(rank > 0)) for rank in ranks)
    layer = DropLoRALinear(base, parts[0][0].spec, config, branches, "later")
    filled = {}
    for index, name in enumerate(("lora_a", "lora_b")):
        like = getattr(layer, name).get_value()
        out = np.zeros(like.shape, np.float32)
        # The ranks in front, so that those of an adapter are a slice: a view of `out`.
        rank_axis = -1 if name == "lora_a" else -1 - len(layer.spec.produced)
        by_layer = [np.moveaxis(factor, rank_axis, 0) for factor in _layers(out, layer)]
        starts = [0] * len(ranks)
        for adapter, weight in parts:
            factors = _layers(np.asarray(adapter.factors()[index]), layer)
            for i, branch in enumerate(adapter.branches):
                ranks_first = np.moveaxis(factors[i], rank_axis, 0)[adapter.ranks_of(i)]
                times = weight * branch.scale if name == "lora_b" else 1.0
                by_layer[i][starts[i] : starts[i] + len(ranks_first)] = ranks_first * times
                starts[i] += len(ranks_first)
        filled[name] = jax.device_put(out, like.sharding)
    layer.fill(filled)
    return layer


def _layers(factor: np.ndarray, layer: LowRankLinear) -> np.ndarray:
    """A factor [*stack, ...] as [layers, ...]."""
    return factor.reshape(-1, *factor.shape[len(layer.stack) :])
