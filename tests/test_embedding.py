"""A lookup on a mesh is the lookup of one device, and so is its gradient."""

from __future__ import annotations

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from droplora_jax.embedding import embed
from droplora_jax.sharding import MeshConfig, make_mesh, named_sharding


@pytest.mark.parametrize(
    "config",
    [
        MeshConfig(),
        MeshConfig(data=2, fsdp=2, tensor=2),
        MeshConfig(fsdp=2, tensor=2, context=2),
        MeshConfig(replica=2, fsdp=1, context=4),
        MeshConfig(tensor=8, fsdp=1),
    ],
    ids=str,
)
@pytest.mark.parametrize(("vocab", "rows"), [(24, 8), (23, 8), (24, 3)])
def test_a_lookup_on_a_mesh_is_that_of_one_device(config, vocab, rows):
    """Also where the vocabulary or the rows do not split evenly."""
    mesh = make_mesh(config)
    random = np.random.default_rng(0)
    table = random.standard_normal((vocab, 16)).astype(np.float32)
    tokens = random.integers(0, vocab, (rows, 8)).astype(np.int32)
    dy = random.standard_normal((rows, 8, 16)).astype(np.float32)
    axes = ("vocab", "width")
    placed = jax.device_put(table, named_sharding(mesh, axes, table.shape))
    y, pullback = jax.vjp(jax.jit(lambda table: embed(table, jnp.asarray(tokens), mesh)), placed)
    np.testing.assert_array_equal(y, table[tokens])
    (gradient,) = pullback(jnp.asarray(dy))
    expected = np.zeros_like(table)
    np.add.at(expected, tokens, dy)
    np.testing.assert_allclose(gradient, expected, rtol=1e-5, atol=1e-5)
