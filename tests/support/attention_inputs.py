"""What the tests of attention kernels give them, and what PyTorch makes of it."""

from __future__ import annotations

from collections.abc import Callable

import jax
import jax.numpy as jnp
import numpy as np
import torch

from droplora_jax.nn.attention.kernel import AttentionInputs

Segments = Callable[[int], jax.Array]


def inputs(
    length: int, kv_heads: int = 2, head_dim: int = 8, dtype=jnp.float32, rows: int = 2
) -> list[jax.Array]:
    """q, k, v, and a gradient of the result."""
    draw = np.random.default_rng(0).normal
    shapes = [(rows, length, n, head_dim) for n in (4, kv_heads, kv_heads, 4)]
    return [jnp.asarray(draw(size=shape), dtype) for shape in shapes]


def packed(length: int) -> jax.Array:
    """Documents of a third of the row, in the first row; one and padding in the second."""
    third = np.arange(length) * 3 // length
    return jnp.asarray(np.stack([third + 1, third == 0]), jnp.int32)


def padded_first(length: int) -> jax.Array:
    """A document, another and padding; padding and one document."""
    third = np.arange(length) * 3 // length
    return jnp.asarray(np.stack([(third + 1) % 3, third > 0]), jnp.int32)


def results(attend: Callable[[AttentionInputs], jax.Array], given: AttentionInputs, dy: jax.Array):
    """The result, and the gradients of q, k and v, in one program."""
    return jax.jit(lambda *qkv_dy: both(attend, given, *qkv_dy))(*given[:3], dy)


def both(attend, given: AttentionInputs, q, k, v, dy):
    y, pullback = jax.vjp(lambda *qkv: attend(AttentionInputs(*qkv, *given[3:])), q, k, v)
    return y, *pullback(dy)


def of_pytorch(given: AttentionInputs, dy: jax.Array) -> list[np.ndarray]:
    """The same by PyTorch, in float64, from a mask of all pairs."""
    length, window = given.q_BTNH.shape[1], given.window
    distance = np.arange(length)[:, None] - np.arange(length)
    allowed = (distance >= 0) & (distance < (window or length))
    allowed = np.broadcast_to(allowed, (given.q_BTNH.shape[0], 1, length, length))
    if given.segment_ids_BT is not None:
        segments = np.asarray(given.segment_ids_BT)
        allowed = allowed & (segments[:, None, :, None] == segments[:, None, None, :])
    qkv = [torch.tensor(np.asarray(x, np.float64), requires_grad=True) for x in given[:3]]
    y = torch.nn.functional.scaled_dot_product_attention(
        *(x.transpose(1, 2) for x in qkv), attn_mask=torch.tensor(allowed.copy()), enable_gqa=True
    ).transpose(1, 2)
    y.backward(torch.tensor(np.asarray(dy, np.float64)))
    return [x.numpy() for x in (y.detach(), *(x.grad for x in qkv))]
