"""The layer of DoRA beside its formula in PyTorch."""

from __future__ import annotations

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import torch
from flax import nnx
from oracles import relative
from small_models import linear

from droplora_jax import DoRA, linear_spec
from droplora_jax.core import prng

KEY = prng.root_key(0)
FACTORS = ("lora_a", "lora_b", "magnitude")


@jax.jit
def output_and_gradients(graphdef, factors, rest, x):
    """Outputs of the adapter, of its base and of its merge, its mask, and gradients of squares."""

    def run(factors):
        y = nnx.merge(graphdef, factors, rest)(x)
        return jnp.sum(y**2), y

    (_, y), gradients = jax.value_and_grad(run, has_aux=True)(factors)
    adapter = nnx.merge(graphdef, factors, rest)
    mask = adapter.mask(jnp.ones((*x.shape[:-1], 4)))
    return y, adapter.base(x), adapter.merged()(x), mask, gradients


@pytest.mark.parametrize("masked", [False, True])
def test_dora_and_its_gradients_equal_pytorch(masked, strict):
    """The branch is masked, the norm is that of the kernel without a mask, and a constant."""
    rng = np.random.default_rng(0)
    layer = linear(12, 10)
    layer.bias.set_value(jnp.asarray(rng.standard_normal(10, np.float32)))
    config = DoRA(rank=4, alpha=6, granularity="step")
    adapter = config.adapt(layer, linear_spec(layer), ("q_proj",), KEY)
    x = rng.standard_normal((3, 5, 12), np.float32)
    kernel, bias = np.asarray(layer.kernel[...]), np.asarray(layer.bias[...])
    if masked:
        adapter.mask_key = adapter.mask_key.replace(jax.random.split(KEY, 1))
    graphdef, factors, rest = nnx.split(adapter, nnx.LoRAParam, ...)
    at_first, unadapted, *_ = output_and_gradients(graphdef, factors, rest, x)
    np.testing.assert_allclose(at_first, unadapted, rtol=1e-6, atol=1e-6)

    values = {name: rng.standard_normal(factors[name].shape, np.float32) for name in FACTORS}
    factors = nnx.map_state(lambda path, p: p.replace(jnp.asarray(values[path[-1]])), factors)
    ours, _, merged, mask, gradients = output_and_gradients(graphdef, factors, rest, x)
    mask = np.ones(4, np.float32) if mask is None else np.asarray(mask).reshape(-1)[-4:]
    assert masked == (mask == 0).any()

    a, b, m = (torch.tensor(values[name], requires_grad=True) for name in FACTORS)
    w, inputs = torch.tensor(kernel), torch.tensor(x)
    norm = torch.linalg.norm(w + 1.5 * a @ b, dim=0).detach()
    y = m / norm * (inputs @ w + 1.5 * (inputs @ a * torch.tensor(mask)) @ b) + torch.tensor(bias)
    (y**2).sum().backward()
    assert relative(ours, y.detach().numpy()) < 1e-5
    for name, theirs in zip(FACTORS, (a, b, m), strict=True):
        assert relative(gradients[name][...], theirs.grad.numpy()) < 1e-5
    if not masked:
        assert relative(merged, y.detach().numpy()) < 1e-5
