"""Causal attention by tokamax's kernel for NVIDIA GPUs: keys of other segments are skipped.

Letters: `B` batch, `T` position, `N` query heads, `K` key/value heads, `H` head width.
"""

from __future__ import annotations

from importlib.metadata import PackageNotFoundError, version
from typing import Any

import jax
import jax.numpy as jnp
from jax.ad_checkpoint import checkpoint_name
from jax.typing import DTypeLike
from jaxtyping import Array, Float

from droplora_jax.nn import ops
from droplora_jax.nn.attention.kernel import AttentionInputs, Device, static_window

# Tokamax's public function takes segments only as a mask of all pairs, and does not let the caller
# choose what is saved for the backward pass. The class that does is private, so this file is made
# for one version and runs only if `model.attention` names it.
VERSION = "0.0.17"

# The names of the kernel's calls in a jaxpr.
FORWARD, BACKWARD = "tokamax_forward", "tokamax_backward"


def refusal(device: Device, dtype: DTypeLike, head_dim: int) -> str | None:
    """Why the kernel can't run on an NVIDIA GPU; None if it can."""
    if jnp.dtype(dtype) not in (jnp.bfloat16, jnp.float16):
        return f"it takes bfloat16 and float16, not {jnp.dtype(dtype).name}"
    if head_dim not in (64, 128):
        return f"it takes heads of 64 or 128, not of {head_dim}"
    if not 9 <= float(device.compute_capability) < 11:
        return (
            "it takes GPUs of compute capability 9 and 10, not of "
            f"{float(device.compute_capability):g}"
        )
    installed = _installed()
    if installed != VERSION:
        state = "it is not installed" if installed is None else f"it is of version {installed}"
        return f"{state}: pip install 'droplora-jax[tokamax]' (Python 3.12 or later)"
    return None


def _installed() -> str | None:
    try:
        return version("tokamax")
    except PackageNotFoundError:
        return None


def tokamax_attention(inputs: AttentionInputs) -> Float[Array, "B T N H"]:
    """`dispatch.attention` of what one device has.

    The kernel is told the first key that each position sees. Segments, which have no gaps, and a
    window are both expressed by it.
    """
    q_BTNH, k_BTKH, v_BTKH, segment_ids_BT, _ = inputs
    window = static_window(inputs)
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


def _forward(q_BTNH, k_BTKH, v_BTKH, first_BT):
    result = tokamax_forward(q_BTNH, k_BTKH, v_BTKH, first_BT)
    y_BTNH, softmax = checkpoint_name(result, "attention")
    return y_BTNH, (q_BTNH, k_BTKH, v_BTKH, first_BT, y_BTNH, softmax)


def _backward(residuals, dy_BTNH):
    q_BTNH, k_BTKH, v_BTKH, first_BT, y_BTNH, softmax = residuals
    gradients = tokamax_backward(q_BTNH, k_BTKH, v_BTKH, first_BT, y_BTNH, softmax, dy_BTNH)
    return *gradients, None


_attend.defvjp(_forward, _backward)


# Without a configuration tokamax looks for one that was measured for this GPU and shape, warns that
# there is none, and falls back to its heuristics. Here the heuristics are used at once.


@jax.jit
def tokamax_forward(q_BTNH, k_BTKH, v_BTKH, first_BT):
    """The result, and each softmax's greatest score and sum of exponentials."""
    kernel = _kernel()
    arguments, mask = (q_BTNH, k_BTKH, v_BTKH), _mask(first_BT)
    bound = kernel.bind(*arguments, mask=mask, return_residuals=True)
    configured = kernel.replace(config=bound.heuristics_config)
    return configured(*arguments, mask=mask, return_residuals=True)


@jax.jit
def tokamax_backward(q_BTNH, k_BTKH, v_BTKH, first_BT, y_BTNH, softmax, dy_BTNH):
    """Gradients of q, k and v, from what the forward pass returned."""
    kernel = _kernel()
    options = kernel.bind(q_BTNH, k_BTKH, v_BTKH, mask=_mask(first_BT)).kwargs
    options = {name: value for name, value in options.items() if name != "return_residuals"}
    arguments = (softmax, y_BTNH, dy_BTNH, q_BTNH, k_BTKH, v_BTKH)
    bound = kernel.vjp.bind(*arguments, **options)
    gradients = kernel.vjp.replace(config=bound.heuristics_config)(*arguments, **options)
    return gradients["q"], gradients["k"], gradients["v"]


def _kernel() -> Any:
    from tokamax._src.ops.attention.pallas_mosaic_gpu import PallasMosaicGpuFlashAttention

    return PallasMosaicGpuFlashAttention()


def _mask(first_BT: Array | None) -> Any:
    from tokamax._src.ops.attention.base import Mask

    return Mask(is_causal=True, k_start=None if first_BT is None else first_BT[:, None])
