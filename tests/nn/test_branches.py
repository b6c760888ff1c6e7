from __future__ import annotations

import jax
import jax.numpy as jnp
import pytest
from flax import nnx
from oracles import relative

import droplora_jax as dl
from droplora_jax.nn.branches import apply_all

pytestmark = pytest.mark.usefixtures("strict")


class Fan(nnx.Module):
    """Three layers that read the same input."""

    def __init__(self) -> None:
        rngs = nnx.Rngs(0)
        self.first, self.second = nnx.Linear(6, 5, rngs=rngs), nnx.Linear(6, 3, rngs=rngs)
        self.third = nnx.LinearGeneral(6, (2, 2), rngs=rngs)

    def __call__(self, x, apply=apply_all):
        return apply((self.first, self.second, self.third), x)


def one_by_one(layers, x):
    return [layer(x) for layer in layers]


def masked_fan(targets):
    model = dl.inject(Fan(), dl.DropLoRA(rank=4, targets=targets), key=dl.root_key(1))
    graphdef, adapters, mask_keys, frozen = dl.split(model)
    leaves, tree = jax.tree.flatten(adapters)
    keys = jax.random.split(dl.root_key(2), len(leaves))
    leaves = [jax.random.normal(k, x.shape) for k, x in zip(keys, leaves, strict=True)]
    mask_keys = dl.draw(mask_keys, dl.root_key(3), rows=jnp.arange(2))
    return nnx.merge(graphdef, jax.tree.unflatten(tree, leaves), mask_keys, frozen)


@pytest.mark.parametrize(
    ("targets", "products"),
    [("all-linear", 3 + 2 + 3), (("first", "third"), 3 + 2 + 2), ("second", 3 + 1 + 1)],
)
def test_the_branches_share_one_product_and_nothing_changes(targets, products):
    model = masked_fan(targets)
    x = jax.random.normal(dl.root_key(4), (2, 7, 6))
    assert str(jax.make_jaxpr(model)(x)).count("dot_general[") == products
    for ours, expected in zip(model(x), model(x, one_by_one), strict=True):
        assert relative(ours, expected) < 1e-6


def test_the_ranks_that_a_step_keeps_are_drawn_once_for_each_layer():
    config = dl.DropLoRA(rank=4, targets="all-linear", granularity="step", sampler="exact")
    model = dl.masked(dl.inject(Fan(), config, key=dl.root_key(1)), dl.root_key(3))
    jaxpr = str(jax.make_jaxpr(model)(jnp.ones((2, 7, 6))))
    assert jaxpr.count("name=argsort") == 3
