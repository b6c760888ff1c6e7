"""Causal attention by tokamax's kernel for NVIDIA GPUs: keys of other segments are skipped.

Letters: `B` batch, `T` position, `N` query heads, `K` key/value heads, `H` head width.
"""

from __future__ import annotations

from importlib.metadata import PackageNotFoundError, version
from typing import Any

import jax
import jax.numpy as jnp
from jax.ad_checkpoint import checkpoint_name
from jaxtyping import Array, Float, Int

from droplora_jax.nn import ops

# Its public function takes no segments but as a mask of all pairs, and can't be told what to save
# for the backward pass. What can is not public: this version's.
VERSION = "0.0.17"

# What the kernels' calls are named in a jaxpr.
FORWARD, BACKWARD = "tokamax_forward", "tokamax_backward"


def refusal(device: Any, dtype: Any, head_dim: int) -> str | None:
    """Why the kernel can't be taken on an NVIDIA GPU; None if it can."""
    if jnp.dtype(dtype) not in (jnp.bfloat16, jnp.float16):
        return f"it takes bfloat16 and float16, not {jnp.dtype(dtype).name}"
    if head_dim not in (64, 128):
        return f"it takes heads of 64 or 128, not of {head_dim}"
    if not 9 <= float(device.compute_capability) < 11:
        return (
            "it takes GPUs of compute capability 9 and 10, not of "
            f"{float(device.compute_capability):g}"
        )
    found = _installed()
    if found != VERSION:
        there = "it is not installed" if found is None else f"it is of version {found}"
        return f"{there}: pip install 'droplora-jax[tokamax]' (Python 3.12 or later)"
    return None


def _installed() -> str | None:
    try:
        return version("tokamax")
    except PackageNotFoundError:
        return None


def tokamax_attention(
    q_BTNH: Float[Array, "B T N H"],
    k_BTKH: Float[Array, "B T K H"],
    v_BTKH: Float[Array, "B T K H"],
    segment_ids_BT: Int[Array, "B T"] | None,
    window: int | None,
) -> Float[Array, "B T N H"]:
    """`attention.attention` of what one device has.

    To the kernel a segment, which has no gaps, and a window are one thing: the first key that a
    position sees.
    """
    if segment_ids_BT is None and window is None:
        return _attend(q_BTNH, k_BTKH, v_BTKH, None)
    positions_T = jnp.arange(q_BTNH.shape[1], dtype=jnp.int32)
    first_BT = jnp.zeros(q_BTNH.shape[:2], jnp.int32)
    if segment_ids_BT is not None:
        first_BT = positions_T - ops.positions_in_segments(segment_ids_BT)
    if window is not None:
        first_BT = jnp.maximum(first_BT, positions_T - (window - 1))
    return _attend(q_BTNH, k_BTKH, v_BTKH, first_BT)


@jax.custom_vjp
def _attend(q_BTNH, k_BTKH, v_BTKH, first_BT):
    return tokamax_forward(q_BTNH, k_BTKH, v_BTKH, first_BT)[0]


def _attended(q_BTNH, k_BTKH, v_BTKH, first_BT):
    found = tokamax_forward(q_BTNH, k_BTKH, v_BTKH, first_BT)
    y_BTNH, softmax = checkpoint_name(found, "attention")
    return y_BTNH, (q_BTNH, k_BTKH, v_BTKH, first_BT, y_BTNH, softmax)


def _gradients(saved, dy_BTNH):
    q_BTNH, k_BTKH, v_BTKH, first_BT, y_BTNH, softmax = saved
    found = tokamax_backward(q_BTNH, k_BTKH, v_BTKH, first_BT, y_BTNH, softmax, dy_BTNH)
    return *found, None


_attend.defvjp(_attended, _gradients)


# Without a configuration tokamax looks for one among those that were measured on some GPUs for some
# shapes, warns that there is none for this one, and takes what is taken here at once.


@jax.jit
def tokamax_forward(q_BTNH, k_BTKH, v_BTKH, first_BT):
    """The result, and of every softmax the greatest score and the sum."""
    kernel = _kernel()
    arguments, mask = (q_BTNH, k_BTKH, v_BTKH), _mask(first_BT)
    bound = kernel.bind(*arguments, mask=mask, return_residuals=True)
    configured = kernel.replace(config=bound.heuristics_config)
    return configured(*arguments, mask=mask, return_residuals=True)


@jax.jit
def tokamax_backward(q_BTNH, k_BTKH, v_BTKH, first_BT, y_BTNH, softmax, dy_BTNH):
    """Gradients of q, k and v, from what the forward pass found."""
    kernel = _kernel()
    options = kernel.bind(q_BTNH, k_BTKH, v_BTKH, mask=_mask(first_BT)).kwargs
    options = {name: value for name, value in options.items() if name != "return_residuals"}
    arguments = (softmax, y_BTNH, dy_BTNH, q_BTNH, k_BTKH, v_BTKH)
    bound = kernel.vjp.bind(*arguments, **options)
    found = kernel.vjp.replace(config=bound.heuristics_config)(*arguments, **options)
    return found["q"], found["k"], found["v"]


def _kernel() -> Any:
    from tokamax._src.ops.attention.pallas_mosaic_gpu import PallasMosaicGpuFlashAttention

    return PallasMosaicGpuFlashAttention()


def _mask(first_BT: Array | None) -> Any:
    from tokamax._src.ops.attention.base import Mask

    return Mask(is_causal=True, k_start=None if first_BT is None else first_BT[:, None])
