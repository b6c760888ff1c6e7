"""The factors of models that are not ours, by the names of their layers."""

from __future__ import annotations

import numpy as np
import pytest
from flax import linen as nn
from flax import nnx
from oracles import randomized, relative

import droplora_jax as dl
from droplora_jax.adapters.interop import linen
from droplora_jax.adapters.interop.stored_factors import factors
from droplora_jax.adapters.surgery import adapters_of

KEY = dl.root_key(0)
X = np.ones((2, 3, 4), np.float32)


class Layer(nn.Module):
    @nn.compact
    def __call__(self, x):
        x = nn.DenseGeneral((2, 3), name="q_proj")(x)
        return nn.DenseGeneral(4, axis=(-2, -1), name="down_proj")(x)


class Listed(nn.Module):
    @nn.compact
    def __call__(self, x):
        for i in range(3):
            x = Layer(name=f"layers_{i}")(x)
        return x


class Stacked(nn.Module):
    @nn.compact
    def __call__(self, x):
        scan = nn.scan(
            lambda layer, x, _: (layer(x), None),
            variable_axes={"params": 0},
            split_rngs={"params": True},
            length=3,
        )
        return scan(Layer(name="layers"), x, None)[0]


@pytest.mark.parametrize("module", [Listed(), Stacked()])
def test_the_product_of_the_factors_is_what_the_merge_adds(module):
    params = module.init(KEY, X)["params"]
    config = dl.DropLoRA(rank=4, alpha=8, rank_pattern={r"\.1\.q": 2}, exclude=(r"\.2\.q",))
    model = randomized(dl.inject(linen.to_nnx(module, params, X), config, key=KEY))
    model = without_padding(model)
    merged = linen.params_of(dl.merge(model))
    found = factors(model)
    names = [f"layers.{i}.{name}" for i in range(3) for name in ("q_proj", "down_proj")]
    names.remove("layers.2.q_proj")
    assert sorted(found) == sorted(f"{n}.lora_{x}.weight" for n in names for x in "AB")
    for name in names:
        a, b = (found[f"{name}.lora_{x}.weight"] for x in "AB")
        rank = 2 if name == "layers.1.q_proj" else 4
        assert a.shape[0] == b.shape[1] == rank
        _, i, last = name.split(".")
        if isinstance(module, Listed):
            before, after = (p[f"layers_{i}"][last]["kernel"] for p in (params, merged))
        else:
            before, after = (p["layers"][last]["kernel"][int(i)] for p in (params, merged))
        added = np.asarray(after - before).reshape(a.shape[1], b.shape[0])
        assert relative(8 / rank * (b @ a).T, added) < 1e-5


def without_padding(model):
    """Random factors are not zero beyond a layer's own rank; trained ones are."""
    for adapter in adapters_of(model).values():
        if adapter.ranks is not None:
            a, ranks = adapter.lora_a[...], adapter.ranks[...]
            there = np.arange(a.shape[-1]) < ranks.reshape(-1, *[1] * (a.ndim - 1))
            adapter.lora_a = adapter.lora_a.replace(a * there)
    return model


def test_experts_have_no_single_matrix():
    class Experts(nnx.Module):
        def __init__(self):
            rngs = nnx.Rngs(0)
            self.up = nnx.Einsum("bei,eio->beo", (3, 4, 5), (3, 5), rngs=rngs)

    model = dl.inject(Experts(), dl.DropLoRA(rank=2, targets="up"), key=KEY)
    with pytest.raises(dl.InputError, match="up: a kernel of several experts"):
        factors(model)
