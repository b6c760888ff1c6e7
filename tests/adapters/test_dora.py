"""The gain of DoRA's columns in a model of bfloat16."""

from __future__ import annotations

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx

import droplora_jax as dl

pytestmark = pytest.mark.usefixtures("strict")


@jax.jit
def call(graphdef, state, x):
    return nnx.merge(graphdef, state)(x)


@pytest.mark.parametrize("dtype", ["bfloat16", "float32"])
def test_a_small_change_of_the_magnitude_shows(dtype):
    """One of 0.1%, which a gain of bfloat16 cannot tell from 1."""
    layer = nnx.Linear(64, 32, dtype=dtype, param_dtype=dtype, rngs=nnx.Rngs(0))
    config = dl.DoRA(rank=4, alpha=8.0)
    adapter = config.adapt(layer, dl.linear_spec(layer), ("q_proj",), dl.root_key(0))
    b = jax.random.normal(dl.root_key(1), (4, 32)) / 8
    adapter.lora_b.set_value(b)
    x = jax.random.normal(dl.root_key(2), (512, 64), dtype)
    # The gain is the magnitude over the norm of the sum: 1 but for rounding, then 1.001.
    merged = np.asarray(layer.kernel[...], np.float64) + 2 * np.asarray(adapter.lora_a[...] @ b)
    outputs = []
    for factor in (1.0, 1.001):
        adapter.magnitude.set_value(jnp.asarray(factor * np.linalg.norm(merged, axis=0), "float32"))
        outputs.append(np.asarray(call(*nnx.split(adapter), x), np.float64))
    before, after = outputs
    assert before.std() > 0.1
    # Single outputs are rounded to 8 bits, but all of them together have grown by as much.
    growth = np.sum(after * before) / np.sum(before * before) - 1
    assert growth == pytest.approx(1e-3, rel=0.2)
