"""Cross-entropy against PyTorch, whole and a few positions at a time."""

from __future__ import annotations

from functools import partial

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import torch
from oracles import relative

from droplora_jax.core.config import MeshConfig
from droplora_jax.core.sharding import make_mesh, named_sharding
from droplora_jax.data.batch import IGNORE
from droplora_jax.training.loss import BLOCKS, cross_entropy, projected_cross_entropy

pytestmark = pytest.mark.usefixtures("strict")


def normal(*shape: int, seed: int = 0) -> np.ndarray:
    return np.random.default_rng(seed).normal(size=shape).astype(np.float32)


def test_cross_entropy_equals_pytorch():
    logits, targets = (
        normal(2, 6, 11) * 4,
        np.asarray([[3, -1, 10, 0, 2, -1], [-1, -1, -1, 4, 5, 6]]),
    )
    loss, count = cross_entropy(jnp.asarray(logits), jnp.asarray(targets, jnp.int32))
    expected = torch.nn.functional.cross_entropy(
        torch.tensor(logits).flatten(0, 1),
        torch.tensor(targets).flatten(),
        ignore_index=-1,
        reduction="sum",
    )
    assert int(count) == 7
    assert loss.dtype == jnp.float32
    np.testing.assert_allclose(loss, expected, rtol=1e-6)


def test_cross_entropy_is_float32_for_bfloat16_logits_and_survives_large_ones():
    logits = jnp.asarray([[[1e4, 0.0, -1e4], [3.0, 3.0, 3.0]]], jnp.bfloat16)
    loss, count = cross_entropy(logits, jnp.asarray([[0, 2]], jnp.int32))
    assert (loss.dtype, int(count)) == (jnp.float32, 2)
    np.testing.assert_allclose(loss, np.log(3), rtol=1e-6)


def test_ignored_targets_have_no_gradient_and_none_at_all_is_zero():
    logits = jnp.asarray(normal(1, 3, 5))
    gradient = jax.grad(lambda x, t: cross_entropy(x, t)[0])
    ignored = gradient(logits, jnp.asarray([[1, IGNORE, 2]], jnp.int32))
    np.testing.assert_array_equal(ignored[0, 1], 0)
    assert np.all(np.asarray(ignored[0, [0, 2]]) != 0)
    nothing = jnp.full((1, 3), IGNORE, jnp.int32)
    assert [float(x) for x in cross_entropy(logits, nothing)] == [0, 0]
    np.testing.assert_array_equal(gradient(logits, nothing), 0)


def projected(length: int):
    """Hidden states [3, T, 8], a kernel [8, 11] and targets, a third of them without a loss."""
    targets = np.random.default_rng(1).integers(0, 11, (3, length))
    targets[np.random.default_rng(2).random(targets.shape) < 0.3] = IGNORE
    return (
        jnp.asarray(normal(3, length, 8)),
        jnp.asarray(normal(8, 11, seed=1)),
        jnp.asarray(targets, jnp.int32),
    )


def whole(x, kernel, targets):
    return cross_entropy(x @ kernel, targets)


def in_blocks(x, kernel, targets):
    return projected_cross_entropy(lambda x: x @ kernel, x, targets)


@pytest.mark.parametrize("length", [1, 5, BLOCKS, 13, 64])
def test_in_blocks_it_is_the_same_loss_with_the_same_gradients(length):
    x, kernel, targets = projected(length)
    (loss, count), (dx, dkernel) = jax.jit(
        jax.value_and_grad(in_blocks, argnums=(0, 1), has_aux=True)
    )(x, kernel, targets)
    (expected, labelled), (dx_whole, dkernel_whole) = jax.value_and_grad(
        whole, argnums=(0, 1), has_aux=True
    )(x, kernel, targets)
    assert int(count) == int(labelled)
    assert int(in_blocks(x, kernel, targets)[1]) == int(labelled)
    for ours, oracle in [
        (loss, expected),
        (in_blocks(x, kernel, targets)[0], expected),
        (dx, dx_whole),
        (dkernel, dkernel_whole),
    ]:
        assert ours.dtype == oracle.dtype
        assert relative(ours, oracle) < 1e-6


def test_in_blocks_the_gradient_is_scaled_with_the_loss():
    x, kernel, targets = projected(13)
    one = jax.grad(lambda x: in_blocks(x, kernel, targets)[0])(x)
    three = jax.grad(lambda x: 3 * in_blocks(x, kernel, targets)[0])(x)
    assert relative(three, 3 * one) < 1e-6


def test_no_logits_of_the_whole_batch_exist_and_a_frozen_head_has_no_gradient():
    x, kernel, targets = projected(64)
    step = jax.jit(jax.grad(lambda x, kernel: in_blocks(x, kernel, targets)[0]))
    text = step.lower(x, kernel).as_text()
    assert f"tensor<1x{3 * 64 // BLOCKS}x11xf32>" in text
    assert not any(f"tensor<{shape}x11xf32>" in text for shape in ("3x64", "1x192", "192"))
    products = [line for line in text.splitlines() if "dot_general" in line]
    assert len(products) == 2, products  # the logits of a block, and the gradient of its x


@pytest.mark.parametrize("labelled", [0, 1, 24, 25, 64])
def test_only_blocks_with_a_target_are_projected(labelled):
    x, kernel, targets = projected(64)
    places = np.random.default_rng(3).permutation(targets.size)[:labelled]
    few = np.full(targets.size, IGNORE, np.int32)
    few[places] = 5
    few = jnp.asarray(few.reshape(targets.shape))
    calls = []

    def project(x):
        jax.debug.callback(lambda: calls.append(1))
        return x @ kernel

    def loss(x):
        return projected_cross_entropy(project, x, few)[0]

    value, gradient = jax.jit(jax.value_and_grad(loss))(x)
    jax.effects_barrier()
    assert len(calls) == -(-labelled // (targets.size // BLOCKS))
    expected = jax.value_and_grad(lambda x: whole(x, kernel, few)[0])(x)
    np.testing.assert_allclose(value, expected[0], rtol=1e-5)
    np.testing.assert_allclose(gradient, expected[1], rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize(
    "shape", [{"data": 2, "fsdp": 2, "tensor": 2}, {"fsdp": 4, "context": 2}, {"fsdp": 8}]
)
def test_on_a_mesh_it_is_the_same(shape):
    """Whatever of the rows and the positions is split."""
    mesh = make_mesh(MeshConfig(**{"fsdp": 1, **shape}))
    rows = np.tile(np.arange(3), 8)[:8]
    x, kernel, targets = projected(64)
    x, targets = x[rows], targets[rows]

    def loss(x, kernel, targets, mesh=None):
        return projected_cross_entropy(lambda x: x @ kernel, x, targets, mesh=mesh)[0]

    split = named_sharding(mesh, ("batch", "position"))
    placed = [jax.device_put(array, split) for array in (x, targets)]
    step = jax.jit(jax.value_and_grad(partial(loss, mesh=mesh), argnums=(0, 1)))
    value, gradients = step(placed[0], kernel, placed[1])
    expected, of_plain = jax.value_and_grad(loss, argnums=(0, 1))(x, kernel, targets)
    np.testing.assert_allclose(value, expected, rtol=1e-6)
    for ours, plain in zip(gradients, of_plain, strict=True):
        assert relative(ours, plain) < 1e-6
    moved = [
        name
        for name in ("all-gather", "all-to-all")
        if f" {name}(" in step.lower(placed[0], kernel, placed[1]).compile().as_text()
    ]
    assert not moved or shape.get("context")
