from __future__ import annotations

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
