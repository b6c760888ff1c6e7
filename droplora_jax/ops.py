"""Pure building blocks of a decoder: norm, positions, attention, loss.

Letters: `B` batch, `T` query position, `S` key position, `N` query heads, `K` key/value heads,
`H` head width, `D` model width, `V` vocabulary. Segment 0 is padding.
"""

from __future__ import annotations

import jax
import jax.numpy as jnp
from jaxtyping import Array, Bool, Float, Int

IGNORE = -1  # a target that has no loss


def rms_norm(
    x: Float[Array, "... D"], scale_D: Float[Array, "D"], epsilon: float
) -> Float[Array, "... D"]:
    """Root-mean-square norm (arXiv 1910.07467), computed in float32, in the dtype of `x`."""
    x32 = x.astype(jnp.float32)
    inverse = jax.lax.rsqrt(jnp.mean(jnp.square(x32), axis=-1, keepdims=True) + epsilon)
    return (x32 * inverse).astype(x.dtype) * scale_D.astype(x.dtype)


def positions_in_segments(segment_ids_BT: Int[Array, "B T"]) -> Int[Array, "B T"]:
    """Positions that restart at 0 where the segment changes."""
    length = segment_ids_BT.shape[1]
    index_BT = jnp.broadcast_to(jnp.arange(length, dtype=jnp.int32), segment_ids_BT.shape)
    changed = segment_ids_BT[:, 1:] != segment_ids_BT[:, :-1]
    starts_BT = jnp.pad(jnp.where(changed, index_BT[:, 1:], 0), ((0, 0), (1, 0)))
    return index_BT - jax.lax.cummax(starts_BT, axis=1)


def attention(
    q_BTNH: Float[Array, "B T N H"],
    k_BSKH: Float[Array, "B S K H"],
    v_BSKH: Float[Array, "B S K H"],
    segment_ids_BT: Int[Array, "B T"] | None = None,
) -> Float[Array, "B T N H"]:
    """Causal softmax attention with grouped keys and values, scaled by H ** -0.5.

    A position sees earlier ones of its own segment only.
    """
    mask = None if segment_ids_BT is None else _same_segment(segment_ids_BT)
    return jax.nn.dot_product_attention(q_BTNH, k_BSKH, v_BSKH, mask=mask, is_causal=True)


def _same_segment(segment_ids_BT: Int[Array, "B T"]) -> Bool[Array, "B 1 T T"]:
    return segment_ids_BT[:, None, :, None] == segment_ids_BT[:, None, None, :]


def cross_entropy(
    logits_BTV: Float[Array, "B T V"], targets_BT: Int[Array, "B T"]
) -> tuple[Float[Array, ""], Int[Array, ""]]:
    """Summed negative log-likelihood of the targets in float32, and how many there are.

    Targets equal to `IGNORE` count for nothing.
    """
    logits = logits_BTV.astype(jnp.float32)
    labelled = targets_BT != IGNORE
    index = jnp.where(labelled, targets_BT, 0)[..., None]
    target_logits = jnp.take_along_axis(logits, index, axis=-1)[..., 0]
    losses = jax.nn.logsumexp(logits, axis=-1) - target_logits
    return jnp.sum(losses, where=labelled), jnp.sum(labelled, dtype=jnp.int32)
