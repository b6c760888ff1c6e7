"""What the tests of attention's kernels give them."""

from __future__ import annotations

import jax
import jax.numpy as jnp
import numpy as np


def inputs(length: int, kv_heads: int = 2, head_dim: int = 8, dtype=jnp.float32):
    """q, k, v, and a gradient of the result."""
    draw = np.random.default_rng(0).normal
    shapes = [(2, length, n, head_dim) for n in (4, kv_heads, kv_heads, 4)]
    return [jnp.asarray(draw(size=shape), dtype) for shape in shapes]


def packed(length: int) -> jax.Array:
    """Documents of a third of the row, in the first row; one and padding in the second."""
    third = np.arange(length) * 3 // length
    return jnp.asarray(np.stack([third + 1, third == 0]), jnp.int32)


def padded_first(length: int) -> jax.Array:
    """A document, another and padding; padding and one document."""
    third = np.arange(length) * 3 // length
    return jnp.asarray(np.stack([(third + 1) % 3, third > 0]), jnp.int32)


def both(f, q, k, v, dy):
    y, pullback = jax.vjp(f, q, k, v)
    return y, *pullback(dy)
