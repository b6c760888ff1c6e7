"""Causal attention by cuDNN's flash kernel for NVIDIA GPUs: no scores are stored.

Letters: `B` batch, `T` position, `N` query heads, `K` key/value heads, `H` head width.
"""

from __future__ import annotations

from typing import Any

import jax
import jax.numpy as jnp
from jaxtyping import Array, Bool, Float, Int

# What JAX calls the kernel in a jaxpr.
FORWARD, BACKWARD = (f"dot_product_attention_{way}_wrapper" for way in ("fwd", "bwd"))


def refusal(device: Any, dtype: Any, head_dim: int) -> str | None:
    """Why the kernel can't be taken on an NVIDIA GPU; None if it can."""
    if jnp.dtype(dtype) not in (jnp.bfloat16, jnp.float16):
        return f"it takes bfloat16 and float16, not {jnp.dtype(dtype).name}"
    widest = 256 if float(device.compute_capability) >= 9 else 128
    if head_dim > widest or head_dim % 8:
        return f"it takes heads of up to {widest} in steps of 8 on this GPU, not of {head_dim}"
    return None


def cudnn_attention(
    q_BTNH: Float[Array, "B T N H"],
    k_BTKH: Float[Array, "B T K H"],
    v_BTKH: Float[Array, "B T K H"],
    segment_ids_BT: Int[Array, "B T"] | None,
    window: int | None,
) -> Float[Array, "B T N H"]:
    """`attention.attention` of what one device has.

    The kernel knows of no segments: what they allow is a [B, 1, T, T] mask that it reads as a
    bias. A window is its own business, but not beside a bias (before cuDNN 9.10.2): then it is
    part of the mask.
    """
    length = q_BTNH.shape[1]
    fill = ((0, 0), (0, length % 2))  # with a bias, gradients are of even lengths only
    q, k, v = (jnp.pad(x, (*fill, (0, 0), (0, 0))) for x in (q_BTNH, k_BTKH, v_BTKH))
    mask = None
    if segment_ids_BT is not None:
        mask = _visible(jnp.pad(segment_ids_BT, fill), window)
    y_BTNH = jax.nn.dot_product_attention(
        q,
        k,
        v,
        mask=mask,
        is_causal=True,
        local_window_size=None if window is None or mask is not None else (window - 1, 0),
        implementation="cudnn",
    )
    return y_BTNH[:, :length]


def _visible(segment_ids_BT: Int[Array, "B T"], window: int | None) -> Bool[Array, "B 1 T T"]:
    """What segments and a window allow; what comes later is the kernel's business."""
    visible = segment_ids_BT[:, :, None] == segment_ids_BT[:, None, :]
    if window is not None:
        positions_T = jnp.arange(visible.shape[1], dtype=jnp.int32)
        visible = visible & (positions_T[:, None] - positions_T < window)
    return visible[:, None]


def is_forward(primitive: Any, *_: Any, **__: Any) -> bool:
    """A policy for `jax.checkpoint`: what the kernel's forward pass found is saved."""
    return primitive.name == FORWARD
