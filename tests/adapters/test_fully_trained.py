"""Parameters that are trained without a branch."""

from __future__ import annotations

import jax
import pytest
from flax import nnx
from small_models import linear

from droplora_jax import DropLoRA, InputError
from droplora_jax.adapters.fully_trained import wholes_of
from droplora_jax.adapters.surgery import inject, merge, split
from droplora_jax.core import prng
from droplora_jax.nn.layer_paths import dotted

KEY = prng.root_key(0)


def test_what_can_be_trained_whole():
    class Net(nnx.Module):
        def __init__(self):
            self.a = linear(4, 4)
            self.parts = nnx.List([linear(4, 4, seed=1)])

    net = Net()
    config = DropLoRA(rank=2, targets="^a$", train_whole=("bias", r"parts\.0"))
    model = inject(net, config, key=KEY)
    paths = {dotted(path) for path in wholes_of(model)}
    assert paths == {"a.base.bias", "parts.0.kernel", "parts.0.bias"}
    _, trained, _, _ = split(model)
    assert len(jax.tree.leaves(trained)) == 3 + 2
    assert not wholes_of(net)
    assert nnx.graphdef(merge(model)) == nnx.graphdef(net)
    for pattern, message in {
        "x": "train_whole='x' matches no parameter; there are .*a.bias",
        "a": r"train_whole='a' matches a\.kernel, which has an adapter",
    }.items():
        with pytest.raises(InputError, match=message):
            inject(net, DropLoRA(targets="^a$", train_whole=(pattern,)), key=KEY)
