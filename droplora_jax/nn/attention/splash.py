"""Causal attention by JAX's splash kernel for TPUs: scores stay on the chip, none are stored.

Letters: `B` batch, `T` position, `N` query heads, `K` key/value heads, `H` head width.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float, Int

LANES = 128  # positions and head widths come in multiples of it
BLOCK = 512  # positions that the kernel takes at a time at most
# Of keys: as many parts of the queries' gradients are stored where one pass finds all gradients.
PARTS = 4


def refusal(device: Any, dtype: Any, head_dim: int) -> str | None:
    """Why the kernel can't be taken on a TPU; None if it can."""
    if jnp.dtype(dtype) not in (jnp.bfloat16, jnp.float32):
        return f"it takes bfloat16 and float32, not {jnp.dtype(dtype).name}"
    return None


def splash_attention(
    q_BTNH: Float[Array, "B T N H"],
    k_BTKH: Float[Array, "B T K H"],
    v_BTKH: Float[Array, "B T K H"],
    segment_ids_BT: Int[Array, "B T"] | None,
    window: int | None,
    *,
    interpret: bool = False,
) -> Float[Array, "B T N H"]:
    """`attention.attention` of what one device has.

    Args:
      interpret: run the kernel's own program without a TPU, slowly.
    """
    from jax.experimental.pallas.ops.tpu.splash_attention import SegmentIds

    _, length, heads, head_dim = q_BTNH.shape
    block = block_size(length)
    padded = length + -length % block
    # Keys that only fill up are behind every query, and see to themselves.
    scaled_BTNH = q_BTNH * jnp.asarray(head_dim**-0.5, q_BTNH.dtype)
    q, k, v = (_heads_first(x, padded) for x in (scaled_BTNH, k_BTKH, v_BTKH))
    kernel = _kernel(padded, block, heads, window, interpret)
    if segment_ids_BT is None:
        y_BNTH = jax.vmap(kernel)(q, k, v)
    else:
        ids = jnp.pad(segment_ids_BT, ((0, 0), (0, padded - length)))
        y_BNTH = jax.vmap(kernel)(q, k, v, SegmentIds(q=ids, kv=ids))
    return y_BNTH[:, :, :length, :head_dim].swapaxes(1, 2).astype(q_BTNH.dtype)


def block_size(length: int) -> int:
    """Equal blocks of whole lanes, as few as can be, with little to fill up."""
    blocks = -(-length // BLOCK)
    per_block = -(-length // blocks)
    return per_block + -per_block % LANES


def visited(name: str, grid: Sequence[int]) -> float:
    """The share of a kernel's grid that is not skipped: blocks above the diagonal are.

    Args:
      name: of the kernel; those of the keys' gradients go through keys first.
      grid: its last axis goes through the blocks that a block may have to do with, which with a
        window are fewer than there are.
    """
    blocks = grid[-3] if "dkv" in name else grid[-2]
    return min(1.0, (blocks + 1) / (2 * grid[-1]))


def _heads_first(x_BTNH: Array, length: int) -> Float[Array, "B N T H"]:
    """Filled up to whole blocks and lanes."""
    missing = (length - x_BTNH.shape[1], -x_BTNH.shape[3] % LANES)
    x_BTNH = jnp.pad(x_BTNH, ((0, 0), (0, missing[0]), (0, 0), (0, missing[1])))
    return x_BTNH.swapaxes(1, 2)


def _kernel(length: int, block: int, heads: int, window: int | None, interpret: bool) -> Any:
    from jax.experimental.pallas.ops.tpu import splash_attention as splash

    shape = (length, length)
    if window is None:
        mask: Any = splash.CausalMask(shape)
    else:
        mask = splash.LocalMask(shape, window_size=(window - 1, 0), offset=0)
    # With a window the kernel of one pass goes through all blocks, to skip most of them.
    one_pass = window is None and length // block <= PARTS
    sizes = splash.BlockSizes(
        block_q=block,
        block_kv=block,
        block_q_dkv=block,
        block_kv_dkv=block,
        block_q_dq=None if one_pass else block,
        block_kv_dq=None if one_pass else block,
        use_fused_bwd_kernel=one_pass,
    )
    return splash.make_splash_mha(
        mask=splash.MultiHeadMask([mask] * heads),
        block_sizes=sizes,
        head_shards=1,
        q_seq_shards=1,
        residual_checkpoint_name="attention",
        interpret=interpret,
    )
