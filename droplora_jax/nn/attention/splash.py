"""Causal attention by JAX's splash kernel for TPUs: scores stay on the chip, none are stored.

Letters: `B` batch, `T` position, `N` query heads, `K` key/value heads, `H` head width.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence

import jax
import jax.numpy as jnp
from jax.typing import DTypeLike
from jaxtyping import Array, Float

from droplora_jax.nn.attention.kernel import AttentionInputs, Device, static_window

LANES = 128  # positions and head widths are padded to multiples of it
BLOCK = 512  # the most positions of one block
# Most key blocks for which the fused backward pass is used: it stores one partial dq for each.
MAX_FUSED_BLOCKS = 4


def refusal(device: Device, dtype: DTypeLike, head_dim: int) -> str | None:
    """Why the kernel can't run on a TPU; None if it can."""
    if jnp.dtype(dtype) not in (jnp.bfloat16, jnp.float32):
        return f"it takes bfloat16 and float32, not {jnp.dtype(dtype).name}"
    return None


def splash_attention(
    inputs: AttentionInputs, *, interpret: bool = False
) -> Float[Array, "B T N H"]:
    """`dispatch.attention` of what one device has.

    Args:
      interpret: run the kernel's program without a TPU, slowly.
    """
    from jax.experimental.pallas.ops.tpu.splash_attention import SegmentIds

    q_BTNH, k_BTKH, v_BTKH, segment_ids_BT, _ = inputs
    _, length, heads, head_dim = q_BTNH.shape
    block = block_size(length)
    padded = length + -length % block
    # Padding comes after every query, so no query sees a padding key.
    scaled_BTNH = q_BTNH * jnp.asarray(head_dim**-0.5, q_BTNH.dtype)
    q, k, v = (_heads_first(x, padded) for x in (scaled_BTNH, k_BTKH, v_BTKH))
    kernel = _kernel(padded, block, heads, static_window(inputs), interpret)
    if segment_ids_BT is None:
        y_BNTH = jax.vmap(kernel)(q, k, v)
    else:
        ids = jnp.pad(segment_ids_BT, ((0, 0), (0, padded - length)))
        y_BNTH = jax.vmap(kernel)(q, k, v, SegmentIds(q=ids, kv=ids))
    return y_BNTH[:, :, :length, :head_dim].swapaxes(1, 2).astype(q_BTNH.dtype)


def block_size(length: int) -> int:
    """The length of equal blocks of whole lanes: as few blocks as possible, with little padding."""
    blocks = -(-length // BLOCK)
    per_block = -(-length // blocks)
    return per_block + -per_block % LANES


def visited(name: str, grid: Sequence[int]) -> float:
    """The share of a kernel's grid that is computed; blocks above the diagonal are skipped.

    Args:
      name: the kernel's; kernels of the keys' gradients iterate over keys first.
      grid: its last axis iterates over the blocks that one block may interact with; with a
        window these are fewer than all blocks.
    """
    blocks = grid[-3] if "dkv" in name else grid[-2]
    return min(1.0, (blocks + 1) / (2 * grid[-1]))


def _heads_first(x_BTNH: Array, length: int) -> Float[Array, "B N T H"]:
    """[B, T, N, H] to [B, N, T, H], padded to `length` positions and whole lanes."""
    missing = (length - x_BTNH.shape[1], -x_BTNH.shape[3] % LANES)
    x_BTNH = jnp.pad(x_BTNH, ((0, 0), (0, missing[0]), (0, 0), (0, missing[1])))
    return x_BTNH.swapaxes(1, 2)


def _kernel(
    length: int, block: int, heads: int, window: int | None, interpret: bool
) -> Callable[..., Array]:
    from jax.experimental.pallas.ops.tpu import splash_attention as splash

    shape = (length, length)
    mask = (
        splash.CausalMask(shape)
        if window is None
        else splash.LocalMask(shape, window_size=(window - 1, 0), offset=0)
    )
    # With a window the fused kernel would iterate over all blocks only to skip most of them.
    fused = window is None and length // block <= MAX_FUSED_BLOCKS
    sizes = splash.BlockSizes(
        block_q=block,
        block_kv=block,
        block_q_dkv=block,
        block_kv_dkv=block,
        block_q_dq=None if fused else block,
        block_kv_dq=None if fused else block,
        use_fused_bwd_kernel=fused,
    )
    return splash.make_splash_mha(
        mask=splash.MultiHeadMask([mask] * heads),
        block_sizes=sizes,
        head_shards=1,
        q_seq_shards=1,
        residual_checkpoint_name="attention",
        interpret=interpret,
    )
