from __future__ import annotations

import jax.numpy as jnp
import numpy as np
import pytest
import torch
from oracles import relative

from droplora_jax.nn import ops

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


def test_positions_and_lengths_of_segments():
    segments = jnp.asarray([[1, 1, 2, 2, 2, 0], [3, 3, 3, 3, 3, 3]])
    positions, lengths = ops.positions_in_segments(segments), ops.lengths_of_segments(segments)
    np.testing.assert_array_equal(positions, [[0, 1, 0, 1, 2, 0], [0, 1, 2, 3, 4, 5]])
    np.testing.assert_array_equal(lengths, [[2, 2, 3, 3, 3, 1], [6] * 6])
