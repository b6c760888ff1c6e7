"""Causal attention by cuDNN's flash kernel for NVIDIA GPUs: no scores are stored.

Letters: `B` batch, `T` position, `N` query heads, `K` key/value heads, `H` head width.
"""

from __future__ import annotations

import jax
import jax.extend.core
import jax.numpy as jnp
from jax.typing import DTypeLike
from jaxtyping import Array, Bool, Float, Int

from droplora_jax.nn.attention.kernel import AttentionInputs, Device, static_window

# The names of the kernel's calls in a jaxpr.
FORWARD, BACKWARD = (f"dot_product_attention_{way}_wrapper" for way in ("fwd", "bwd"))


def refusal(device: Device, dtype: DTypeLike, head_dim: int) -> str | None:
    """Why the kernel can't run on an NVIDIA GPU; None if it can."""
    if jnp.dtype(dtype) not in (jnp.bfloat16, jnp.float16):
        return f"it takes bfloat16 and float16, not {jnp.dtype(dtype).name}"
    widest = 256 if float(device.compute_capability) >= 9 else 128
    if head_dim > widest or head_dim % 8:
        return f"it takes heads of up to {widest} in steps of 8 on this GPU, not of {head_dim}"
    return None


def cudnn_attention(inputs: AttentionInputs) -> Float[Array, "B T N H"]:
    """`dispatch.attention` of what one device has.

    The kernel knows no segments: which pairs they allow is a [B, 1, T, T] mask that it reads as a
    bias. It applies a window itself, but not together with a bias (before cuDNN 9.10.2); then the
    window is part of the mask.
    """
    length, window = inputs.q_BTNH.shape[1], static_window(inputs)
    fill = ((0, 0), (0, length % 2))  # with a bias, gradients exist for even lengths only
    q, k, v = (jnp.pad(x, (*fill, (0, 0), (0, 0))) for x in inputs[:3])
    mask = None
    if inputs.segment_ids_BT is not None:
        mask = _visible(jnp.pad(inputs.segment_ids_BT, fill), window)
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
    """Which pairs segments and a window allow; the kernel itself hides later positions."""
    visible = segment_ids_BT[:, :, None] == segment_ids_BT[:, None, :]
    if window is not None:
        positions_T = jnp.arange(visible.shape[1], dtype=jnp.int32)
        visible = visible & (positions_T[:, None] - positions_T < window)
    return visible[:, None]


def is_forward(primitive: jax.extend.core.Primitive, *_: object, **__: object) -> bool:
    """A policy for `jax.checkpoint` that saves what the kernel's forward pass computes."""
    return primitive.name == FORWARD
