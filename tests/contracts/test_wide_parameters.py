"""Float32 parameters beside bfloat16 activations: gradients are summed over positions in float32."""

from __future__ import annotations

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx
from oracles import relative

import droplora_jax as dl
from droplora_jax.core.config import MeshConfig
from droplora_jax.core.sharding import constrain, make_mesh
from droplora_jax.models.embed_and_head import Embedding, Head
from droplora_jax.models.layer import Linear, RMSNorm
from droplora_jax.nn import ops
from droplora_jax.training.loss import projected_cross_entropy

ROWS, LENGTH, WIDTH = 8, 512, 16
MESHES = [None, MeshConfig(), MeshConfig(data=2, fsdp=2, tensor=2), MeshConfig(fsdp=2, context=4)]
on_meshes = pytest.mark.parametrize("config", MESHES, ids=str)


def eighths(seed: int, *shape: int, most: int = 64) -> np.ndarray:
    """Whole eighths, exact in bfloat16, whose sums and products' sums are exact in float32."""
    return np.random.default_rng(seed).integers(-most // 2, most, shape) / 8


X, DY = eighths(0, ROWS, LENGTH, WIDTH), eighths(1, ROWS, LENGTH, WIDTH)
PARAMETER = eighths(2, WIDTH)
CASES = {
    "times": (ops.times, PARAMETER, (X * DY).sum((0, 1))),
    "times, one number": (ops.times, PARAMETER[:1], (X * DY).sum()[None]),
    "plus": (ops.plus, PARAMETER, DY.sum((0, 1))),
    "matmul": (ops.matmul, eighths(3, WIDTH, WIDTH), np.einsum("bti,bto->io", X, DY)),
}


@on_meshes
@pytest.mark.parametrize(("apply", "parameter", "expected"), CASES.values(), ids=CASES.keys())
def test_the_gradient_is_exact_where_float32_is(config, apply, parameter, expected):
    mesh = None if config is None else make_mesh(config)
    bf16, f32 = (jnp.asarray(parameter, dtype) for dtype in (jnp.bfloat16, jnp.float32))
    x = jnp.asarray(X, jnp.bfloat16)

    @jax.jit
    def gradient(parameter, dy):
        def y(parameter):
            return apply(constrain(x, ("batch", "position", None), mesh), parameter)

        result, pullback = jax.vjp(y, parameter)
        return result, pullback(dy)[0]

    y, found = gradient(f32, jnp.asarray(DY, jnp.bfloat16))
    assert (y.dtype, found.dtype) == (jnp.bfloat16, jnp.float32)
    np.testing.assert_allclose(found, expected, rtol=1e-6)
    np.testing.assert_array_equal(y, jax.jit(apply)(x, bf16))  # as a parameter that is not trained


LAYERS = {
    "norm": lambda rngs: RMSNorm(WIDTH, 1e-6, dtype=jnp.bfloat16),
    "linear": lambda rngs: Linear(WIDTH, WIDTH, param_dtype=jnp.bfloat16, rngs=rngs),
    "head": lambda rngs: Head(jax.random.normal(rngs.params(), (WIDTH, 24), jnp.bfloat16)),
    "tied head": lambda rngs: Embedding(
        jax.random.normal(rngs.params(), (24, WIDTH), jnp.bfloat16),
        dtype=jnp.bfloat16,
        mesh=None,
        tied=True,
    ).transposed(),
}


def wide(module: nnx.Module) -> nnx.Module:
    """The same values in float32, as what is trained."""
    graphdef, state = nnx.split(module)
    return nnx.merge(graphdef, jax.tree.map(lambda x: x.astype(jnp.float32), state))


def gradients(module: nnx.Module, x: jax.Array, dy: jax.Array) -> dict[str, np.ndarray]:
    graphdef, state = nnx.split(module, nnx.Param)
    _, pullback = jax.vjp(jax.jit(lambda state: nnx.merge(graphdef, state)(x)), state)
    (found,) = pullback(dy)
    return {str(path): np.asarray(v[...]) for path, v in nnx.to_flat_state(found)}


@pytest.mark.usefixtures("strict")
@pytest.mark.parametrize("make", LAYERS.values(), ids=LAYERS.keys())
def test_every_layer_of_a_decoder_sums_in_float32(make):
    """To the rounding of what is summed; a sum in bfloat16 stops growing after 256 positions."""
    layer = wide(make(nnx.Rngs(0)))
    x = jnp.asarray(X, jnp.bfloat16)
    dy = jnp.asarray(1 + eighths(4, *layer(x).shape) / 16, jnp.bfloat16)
    found = gradients(layer, x, dy)
    expected = gradients(layer, x.astype(jnp.float32), dy.astype(jnp.float32))
    assert found.keys() == expected.keys()
    for path, value in found.items():
        assert value.dtype == np.float32
        assert relative(value, expected[path]) < 2e-4, path


@on_meshes
def test_a_trained_head_sums_over_the_blocks_of_the_loss_in_float32(config):
    mesh = None if config is None else make_mesh(config)
    x = jnp.asarray(X, jnp.bfloat16)
    targets = jnp.zeros((ROWS, LENGTH), jnp.int32)
    head = eighths(5, WIDTH, 24, most=4)

    def gradient(x):
        def loss(kernel):
            return projected_cross_entropy(
                lambda x: ops.matmul(x, kernel), constrain(x, ("batch", "position", None), mesh),
                targets, mesh=mesh,
            )[0]  # fmt: skip

        return jax.jit(jax.grad(loss))(jnp.asarray(head, jnp.float32))

    assert relative(gradient(x), gradient(x.astype(jnp.float32))) < 2e-3


@pytest.mark.usefixtures("strict")
@pytest.mark.parametrize(
    ("config", "name"),
    [
        (dl.DoRA(rank=4, drop_rate=0.0, targets=".*", train_whole=("bias",)), "magnitude"),
        (dl.DoRA(rank=4, drop_rate=0.0, targets=".*", train_whole=("bias",)), "bias"),
        (dl.Learned(rank=4, targets=".*"), "mask_logits"),
    ],
    ids=["magnitude", "bias beside a magnitude", "learned mask"],
)
def test_what_an_adapter_trains_beside_its_factors_is_summed_in_float32(config, name):
    layer = Linear(WIDTH, WIDTH, param_dtype=jnp.bfloat16, rngs=nnx.Rngs(0))
    model = dl.inject(nnx.Dict(layer=layer), config, key=dl.root_key(0))
    graphdef, trained, *rest = dl.split(model)
    trained = jax.tree.map(lambda v: v + 0.01, trained)  # B is zero at first
    dy = 1 + eighths(4, ROWS, LENGTH, WIDTH) / 16

    def gradient(dtype):
        x = jnp.asarray(np.abs(X), dtype)
        others = jax.tree.map(
            lambda v: v.astype(dtype) if v.dtype == jnp.bfloat16 else v, tuple(rest)
        )
        y = jax.jit(lambda trained: nnx.merge(graphdef, trained, *others)["layer"](x))
        (found,) = jax.vjp(y, trained)[1](jnp.asarray(dy, dtype))
        return next(np.asarray(v[...]) for path, v in nnx.to_flat_state(found) if path[-1] == name)

    assert relative(gradient(jnp.bfloat16), gradient(jnp.float32)) < 1e-2
