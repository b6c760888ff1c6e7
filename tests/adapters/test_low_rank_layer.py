"""A branch beside a layer: how it starts, what its masks do, and what the layer still answers."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import torch
from flax import nnx
from oracles import primitives, relative
from small_models import linear

from droplora_jax import DropLoRA, LinearSpec, linear_spec
from droplora_jax.adapters.base import Adapter
from droplora_jax.adapters.surgery import draw, split
from droplora_jax.core import prng
from droplora_jax.lowrank import rank_mask

KEY = prng.root_key(0)


def adapter_of(
    width: int = 8, *, path: str = "q_proj", seed: int = 0, layer_seed: int = 0, **options: Any
) -> Adapter:
    layer = linear(width, 8, seed=layer_seed)
    config = DropLoRA(**{"rank": 4, **options})
    return config.adapt(layer, linear_spec(layer), (path,), prng.root_key(seed))


def test_a_starts_as_a_linear_layer_of_pytorch_does_and_b_at_zero():
    adapter = adapter_of(256, rank=128)
    a = np.asarray(adapter.lora_a[...])
    theirs = torch.nn.Linear(256, 128).weight.detach().numpy()  # PEFT's lora_A
    assert a.dtype == np.float32
    assert np.abs(a).max() == pytest.approx(np.abs(theirs).max(), rel=2e-3)
    assert a.std() == pytest.approx(theirs.std(), rel=2e-2)
    assert abs(a.mean()) < 5 * a.std() / np.sqrt(a.size)
    assert not np.asarray(adapter.lora_b[...]).any()


def test_the_initial_a_depends_on_seed_and_path_only():
    def a(**options):
        return np.asarray(adapter_of(**options).lora_a[...])

    first = a()
    np.testing.assert_array_equal(first, a(layer_seed=5))
    np.testing.assert_array_equal(first, a(drop_rate=0.0, granularity="step"))
    for different in (a(path="k_proj"), a(seed=1)):
        assert not np.any(first == different)


def test_an_empty_mask_key_draws_nothing():
    adapter = adapter_of(drop_rate=0.5)
    assert adapter.mask_key[...].size == 0
    jaxpr = jax.make_jaxpr(adapter)(np.ones((2, 3, 8), np.float32))
    assert not any("random" in name or "threefry" in name for name in primitives(jaxpr))


def test_the_branch_computes_in_the_dtype_of_the_layer(strict):
    layer = linear(8, 8, dtype=jnp.bfloat16, param_dtype=jnp.bfloat16)
    adapter = DropLoRA(rank=4).adapt(layer, linear_spec(layer), ("q_proj",), KEY)
    assert adapter.lora_a[...].dtype == adapter.lora_b[...].dtype == jnp.float32
    output = jax.eval_shape(adapter, jax.ShapeDtypeStruct((2, 8), jnp.bfloat16))
    assert output.dtype == jnp.bfloat16


class Shaped(nnx.Module):
    """A layer that other modules ask for more than its output."""

    def __init__(self):
        self.shape = (4, 2, 3)
        self.w = nnx.Param(np.ones(self.shape, np.float32))


def test_what_a_layer_is_asked_beside_being_called_is_answered_by_the_base():
    spec = LinearSpec("BTD", "DNH", "BTNH", attribute="w")
    adapter = DropLoRA(rank=2).adapt(layer := Shaped(), spec, ("q_proj",), KEY)
    assert adapter.shape is layer.shape
    assert adapter.base_kernel is layer.w
    with pytest.raises(AttributeError, match="'w' of a Shaped with an adapter: call the layer"):
        _ = adapter.w
    with pytest.raises(AttributeError, match="nothing_there"):
        _ = adapter.nothing_there


# The exact mask of a step, which takes its ranks out of the factors.


def with_gradients(function: Callable[..., jax.Array], *arguments: Any) -> tuple[Any, ...]:
    """What a function returns, and its gradients with that as the cotangent, in one program."""

    @jax.jit
    def run(*arguments):
        y, pullback = jax.vjp(function, *arguments)
        return y, *pullback(y)

    return run(*arguments)


@pytest.mark.parametrize("rank_pattern", [{}, {"layers.1": 4}])
def test_an_exact_mask_of_a_step_is_a_branch_of_fewer_ranks(rank_pattern):
    """Forward and gradients are the masked branch's, and no product is of the whole rank."""
    config = DropLoRA(rank=10, rank_pattern=rank_pattern, granularity="step", sampler="exact")
    rng = np.random.default_rng(1)
    x, kernel, a, b = (
        rng.standard_normal(shape).astype(np.float32)
        for shape in [(3, 7, 12), (2, 12, 6), (2, 12, 10), (2, 10, 6)]
    )
    layer = linear(12, 6, use_bias=False)
    layer.kernel.set_value(jnp.asarray(kernel))  # a stack of two
    adapter = config.adapt(layer, linear_spec(layer), ("layers", "q_proj"), KEY)
    present = np.arange(10) < np.asarray([branch.rank for branch in adapter.branches])[:, None]
    a, b = a * present[:, None], b * present[..., None]
    graphdef, factors, keys, rest = split(adapter)
    keys = jax.jit(draw)(keys, prng.root_key(3))

    def pruned(a, b):
        values = {"lora_a": a, "lora_b": b}
        filled = nnx.map_state(lambda path, p: p.replace(values[path[-1]]), factors)
        ys = []
        for i in range(2):
            states = jax.tree.map(lambda v, i=i: v[i], (filled, keys, rest))
            ys.append(nnx.merge(graphdef, *states)(jnp.asarray(x)))
        return jnp.stack(ys)

    def masked(a, b):
        ys = []
        for i, branch in enumerate(adapter.branches):
            mask = rank_mask(
                keys["mask_key"].get_value()[i],
                (3, 7, 10),
                drop_rate=0.5,
                granularity="step",
                sampler="exact",
                rescale=True,
                dtype=jnp.float32,
                rank=branch.rank,
            )
            ys.append(x @ kernel[i] + branch.scale * ((x @ a[i]) * mask) @ b[i])
        return jnp.stack(ys)

    y, *gradients = with_gradients(pruned, a, b)
    expected, *expected_gradients = with_gradients(masked, a, b)
    assert relative(y, expected) < 1e-5
    assert not np.allclose(expected, x @ kernel[:, None])
    for ours, theirs in zip(gradients, expected_gradients, strict=True):
        assert relative(ours, theirs) < 1e-5
    program = str(jax.make_jaxpr(pruned)(a, b))
    assert "f32[3,7,5]" in program
    assert "f32[3,7,10]" not in program
