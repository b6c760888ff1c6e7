"""A lookup on a mesh is the lookup of one device, and so is its gradient."""

from __future__ import annotations

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from droplora_jax.core.config import MeshConfig
from droplora_jax.core.sharding import make_mesh, named_sharding
from droplora_jax.models.embed_and_head import Embedding
from droplora_jax.nn.embedding import embed

MESHES = [
    None,
    MeshConfig(),
    MeshConfig(data=2, fsdp=2, tensor=2),
    MeshConfig(fsdp=2, tensor=2, context=2),
    MeshConfig(replica=2, fsdp=1, context=4),
    MeshConfig(tensor=8, fsdp=1),
]


@pytest.mark.parametrize("config", MESHES[1:], ids=str)
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


@pytest.mark.parametrize("config", MESHES, ids=str)
@pytest.mark.parametrize("vocab", [24, 23])
def test_the_gradient_of_a_float32_table_is_summed_in_float32(config, vocab):
    """Beside bfloat16 activations, for a token that is at half of the positions."""
    mesh = None if config is None else make_mesh(config)
    random = np.random.default_rng(0)
    table = random.standard_normal((vocab, 16)).astype(np.float32)
    tokens = random.integers(0, vocab, (8, 512)).astype(np.int32)
    tokens[:, ::2] = 5
    # Whole eighths, whose sums are exact in float32.
    dy = random.integers(-64, 128, (8, 512, 16)) / 8
    placed = jnp.asarray(table)
    if mesh is not None:
        placed = jax.device_put(table, named_sharding(mesh, ("vocab", "width"), table.shape))

    def vectors(table):
        layer = Embedding(table, dtype=jnp.bfloat16, mesh=mesh, tied=False)
        return layer(jnp.asarray(tokens))

    y, pullback = jax.vjp(jax.jit(vectors), placed)
    np.testing.assert_array_equal(y, table.astype(jnp.bfloat16)[tokens])
    (gradient,) = pullback(jnp.asarray(dy, jnp.bfloat16))
    assert gradient.dtype == jnp.float32
    expected = np.zeros(table.shape, np.float64)
    np.add.at(expected, tokens, dy)
    np.testing.assert_allclose(gradient, expected, rtol=1e-6)


def test_a_bfloat16_table_is_looked_up_as_it_is():
    mesh = make_mesh(MeshConfig(fsdp=4, tensor=2))
    table = jax.ShapeDtypeStruct((24, 16), jnp.bfloat16)
    tokens = jnp.zeros((8, 8), jnp.int32)

    def vectors(table):
        return Embedding(table, dtype=jnp.bfloat16, mesh=mesh, tied=False)(tokens)

    assert "convert_element_type[new_dtype=float32" not in str(jax.make_jaxpr(vectors)(table))
