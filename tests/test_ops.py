from __future__ import annotations

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import torch
from oracles import relative

from droplora_jax import ops

pytestmark = pytest.mark.usefixtures("strict")


def normal(*shape: int, seed: int = 0) -> np.ndarray:
    return np.random.default_rng(seed).normal(size=shape).astype(np.float32)


def test_rms_norm_equals_pytorch():
    x, scale = normal(2, 5, 16) * 3, normal(16, seed=1)
    expected = torch.nn.functional.rms_norm(torch.tensor(x), (16,), torch.tensor(scale), 1e-5)
    assert relative(ops.rms_norm(jnp.asarray(x), jnp.asarray(scale), 1e-5), expected) < 1e-6


def test_rms_norm_in_bfloat16_is_computed_in_float32():
    x = jnp.asarray(normal(4, 512) * 1e-3 + 1, jnp.bfloat16)
    y = ops.rms_norm(x, jnp.ones(512, jnp.bfloat16), 1e-6)
    x64 = np.float64(x)
    expected = x64 / np.sqrt((x64**2).mean(-1, keepdims=True) + 1e-6)
    assert y.dtype == jnp.bfloat16
    np.testing.assert_allclose(np.float64(y), expected, rtol=2**-8)  # one rounding, at the end


def test_positions_restart_with_every_segment():
    segments = jnp.asarray(
        [[1, 1, 1, 2, 2, 0], [0, 0, 5, 5, 5, 5], [1, 2, 3, 3, 1, 1], [1, 1, 1, 1, 1, 1]]
    )
    expected = [[0, 1, 2, 0, 1, 0], [0, 1, 0, 1, 2, 3], [0, 0, 0, 1, 0, 1], [0, 1, 2, 3, 4, 5]]
    np.testing.assert_array_equal(ops.positions_in_segments(segments), expected)
    assert ops.positions_in_segments(jnp.ones((2, 1), jnp.int32)).tolist() == [[0], [0]]


@pytest.mark.parametrize("kv_heads", [4, 2, 1])
@pytest.mark.parametrize("packed", [False, True])
def test_attention_equals_pytorch(kv_heads, packed):
    q, k, v = (
        normal(2, 7, 4, 8),
        normal(2, 7, kv_heads, 8, seed=1),
        normal(2, 7, kv_heads, 8, seed=2),
    )
    segments = np.asarray([[1, 1, 1, 2, 2, 2, 2], [3, 3, 1, 1, 1, 0, 0]], np.int32)
    allowed = np.tril(np.ones((7, 7), bool))[None, None]
    if packed:
        allowed = allowed & (segments[:, None, :, None] == segments[:, None, None, :])
    expected = torch.nn.functional.scaled_dot_product_attention(
        *(torch.tensor(x).transpose(1, 2) for x in (q, k, v)),
        attn_mask=torch.tensor(np.broadcast_to(allowed, (2, 1, 7, 7)).copy()),
        enable_gqa=True,
    ).transpose(1, 2)
    ours = ops.attention(
        jnp.asarray(q), jnp.asarray(k), jnp.asarray(v), jnp.asarray(segments) if packed else None
    )
    assert relative(ours, expected) < 1e-5


def test_attention_in_bfloat16_is_close_and_stays_bfloat16():
    q, k, v = (jnp.asarray(normal(1, 7, 2, 8, seed=i)) for i in range(3))
    y = ops.attention(*(x.astype(jnp.bfloat16) for x in (q, k, v)))
    assert y.dtype == jnp.bfloat16
    assert relative(y, ops.attention(q, k, v)) < 1e-2


def test_cross_entropy_equals_pytorch():
    logits, targets = (
        normal(2, 6, 11) * 4,
        np.asarray([[3, -1, 10, 0, 2, -1], [-1, -1, -1, 4, 5, 6]]),
    )
    loss, count = ops.cross_entropy(jnp.asarray(logits), jnp.asarray(targets, jnp.int32))
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
    loss, count = ops.cross_entropy(logits, jnp.asarray([[0, 2]], jnp.int32))
    assert (loss.dtype, int(count)) == (jnp.float32, 2)
    np.testing.assert_allclose(loss, np.log(3), rtol=1e-6)


def test_ignored_targets_have_no_gradient_and_none_at_all_is_zero():
    logits = jnp.asarray(normal(1, 3, 5))
    gradient = jax.grad(lambda x, t: ops.cross_entropy(x, t)[0])
    ignored = gradient(logits, jnp.asarray([[1, ops.IGNORE, 2]], jnp.int32))
    np.testing.assert_array_equal(ignored[0, 1], 0)
    assert np.all(np.asarray(ignored[0, [0, 2]]) != 0)
    nothing = jnp.full((1, 3), ops.IGNORE, jnp.int32)
    assert [float(x) for x in ops.cross_entropy(logits, nothing)] == [0, 0]
    np.testing.assert_array_equal(gradient(logits, nothing), 0)
