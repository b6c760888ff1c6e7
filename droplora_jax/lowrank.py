"""DropLoRA as pure functions: the whole method, and the file to read first.

    y = x @ W + scale * ((x @ A) * m) @ B        A: [I, R]   B: [R, O]   m: mask over R

While training, `rank_mask` prunes the rank dimension at random (arXiv 2508.17337, section 3), so
that every step moves through another low-rank subspace. Evaluation and the merge have no mask:
`W' = W + scale * A @ B`. Without a mask the branch is LoRA (arXiv 2106.09685), exactly.

Letters: `B` batch rows, `T` positions, `R` rank, `I` / `O` a layer's input / output width.
"""

from __future__ import annotations

import itertools

import jax
import jax.numpy as jnp
from jax.ad_checkpoint import checkpoint_name
from jax.typing import DTypeLike
from jaxtyping import Array, Bool, Float, Int, Key, UInt32

from droplora_jax.core import einsum
from droplora_jax.core.mask_options import Granularity, Sampler, kept_ranks


@jax.named_scope("mask")
def rank_mask(
    mask_key: Key[Array, "*keys"],
    shape: tuple[int, ...],
    *,
    drop_rate: float | Float[Array, ""],
    granularity: Granularity,
    sampler: Sampler,
    rescale: bool,
    dtype: DTypeLike,
    kept: int | Int[Array, ""] | None = None,
    rank: int | Int[Array, ""] | None = None,
) -> Float[Array, "*mask"]:
    """Draw the mask `m` that multiplies `x @ A`; 0 where a rank is dropped.

    Args:
      mask_key: [B], one key for each row, at `token` and `sequence`; at `sequence` also [B, T],
        one for each position, equal within a document; [1] at `step`.
      shape: the shape of `x @ A`, [B, ..., R].
      drop_rate: the probability p in [0, 1) that a rank is dropped; `bernoulli` rounds it to
        a multiple of 2**-16.
      sampler: `bernoulli` keeps each rank with probability 1 - p; `exact` keeps `kept` of them,
        uniformly chosen.
      rescale: scale what is kept by 1 / (1 - p).
      kept: how many ranks `exact` keeps; default: `kept_ranks`. Required if the rate or the rank
        is traced.
      rank: the layer's own rank, where R is padded to the rank of other layers; `exact` keeps
        only ranks below it.

    Returns:
      A mask that broadcasts against `shape`.
    """
    sample_shape = shape[1:] if granularity == "token" else shape[-1:]
    if sampler == "exact" and kept is None:
        kept = kept_ranks(int(shape[-1] if rank is None else rank), float(drop_rate))

    def sample(key: Array) -> Array:
        if sampler == "exact":
            return _keep_exactly(_order(key, sample_shape, rank), kept)
        return _random_halves(key, sample_shape) >= _threshold(drop_rate)

    for _ in range(mask_key.ndim):
        sample = jax.vmap(sample)
    # One byte per rank is cheaper to save for the backward pass than to draw again.
    keep = checkpoint_name(sample(mask_key), "dots")  # [*keys, *sample_shape]

    missing = max(len(shape) - keep.ndim, 0)
    keep = keep.reshape(*mask_key.shape, *(1,) * missing, *sample_shape)
    return jnp.where(keep, _kept_value(drop_rate, rescale, dtype), jnp.asarray(0, dtype))


def _kept_value(drop_rate: float | Array, rescale: bool, dtype: DTypeLike) -> Array:
    return jnp.asarray(1.0 / (1.0 - drop_rate) if rescale else 1.0, dtype)


def _threshold(drop_rate: float | Array) -> Array:
    """Ranks whose 16-bit random number is below this are dropped."""
    steps = jnp.round(jnp.asarray(drop_rate, jnp.float32) * 2**16)
    return jnp.minimum(steps, 2**16 - 1).astype(jnp.uint32)


def _random_halves(key: Array, shape: tuple[int, ...]) -> Array:
    """Uniform 16-bit numbers, two from each 32-bit word, since drawing words is what costs."""
    *rest, rank = shape
    words = jax.random.bits(key, (*rest, -(-rank // 2)), jnp.uint32)
    return jnp.concatenate([words & 0xFFFF, words >> 16], axis=-1)[..., :rank]


def _order(key: Array, shape: tuple[int, ...], rank: int | Array | None) -> UInt32[Array, "... R"]:
    """Distinct random numbers; ranks that only pad R get the largest ones."""
    size = shape[-1]
    index_bits = max(size - 1, 1).bit_length()
    index = jnp.arange(size, dtype=jnp.uint32)
    bits = (jax.random.bits(key, shape, jnp.uint32) << index_bits) | index
    padding = jnp.uint32(0) if rank is None else (jnp.arange(size) >= rank).astype(jnp.uint32)
    return (bits & 0x7FFFFFFF) | (padding << 31)


def _keep_exactly(order: Array, kept: int | Array | None) -> Bool[Array, "... R"]:
    """The `kept` ranks with the smallest numbers; one sort of numbers instead of two argsorts."""
    ascending = jnp.sort(order, axis=-1)
    last = jnp.take(ascending, jnp.maximum(jnp.asarray(kept) - 1, 0), axis=-1)
    return (order <= last[..., None]) & (jnp.asarray(kept) > 0)


@jax.named_scope("mask")
def subspace(
    mask_key: Key[Array, "1"],
    size: int,
    most: int,
    *,
    kept: int | Int[Array, ""],
    drop_rate: float | Float[Array, ""],
    rescale: bool,
    dtype: DTypeLike,
    rank: int | Int[Array, ""] | None = None,
) -> tuple[Int[Array, "K"], Float[Array, "K"]]:
    """The ranks that an `exact` mask of a whole step keeps, and the mask's values for them.

    A branch of only these ranks equals the masked branch, without the products with zeros.

    Args:
      size: R.
      most: K, the number of ranks returned. The first `kept` of them are those that `rank_mask`
        keeps; for the others the value is zero.
    """
    index_K = jnp.argsort(_order(mask_key[0], (size,), rank))[:most]
    value = _kept_value(drop_rate, rescale, dtype)
    return index_K, jnp.where(jnp.arange(most) < kept, value, jnp.asarray(0, dtype))


def learned_mask(
    logits: Float[Array, "*stack R"], rank: Int[Array, "*stack"] | None = None
) -> Float[Array, "*stack R"]:
    """1 where sigmoid(logit) >= 1/2, else 0, divided by the share of ranks that are kept.

    The gradient is straight-through: the threshold is differentiated as if it were the sigmoid,
    and the share is a constant. If no rank is kept, the mask is zero.

    Args:
      rank: the layer's own rank, where R is padded to the rank of other layers.
    """
    size = logits.shape[-1]
    present = jnp.ones(size, bool) if rank is None else jnp.arange(size) < rank[..., None]
    soft = jax.nn.sigmoid(logits)
    hard = (soft >= 0.5) & present
    kept, count = (jnp.sum(ranks, axis=-1, keepdims=True) for ranks in (hard, present))
    share = (jnp.maximum(kept, 1) / jnp.maximum(count, 1)).astype(soft.dtype)
    straight_through = hard.astype(soft.dtype) + (soft - jax.lax.stop_gradient(soft))
    return jnp.where(present, straight_through / share, 0)


def take_ranks(factor: Float[Array, "..."], index_K: Int[Array, "K"], axis: int) -> Array:
    """The ranks `index_K` of a factor, along `axis`."""
    return jnp.take(factor, index_K, axis, unique_indices=True, mode="clip")


@jax.named_scope("low_rank")
def compress(
    x: Float[Array, "..."], *factors: Float[Array, "..."], down: str = "...i,ir->...r"
) -> list[Float[Array, "..."]]:
    """`x @ A` for the A of every layer that reads `x`, in one product and in the dtype of `x`.

    `down` is the product as an einsum, for kernels that are not plain matrices [I, O].
    """
    a = factors[0] if len(factors) == 1 else jnp.concatenate(factors, axis=-1)
    h = checkpoint_name(einsum.product(down, x, a), "dots")  # [..., sum of R]
    ends = list(itertools.accumulate(factor.shape[-1] for factor in factors))
    return jnp.split(h, ends[:-1], axis=-1)


@jax.named_scope("low_rank")
def lowrank_delta(
    h: Float[Array, "..."],
    b: Float[Array, "..."],
    *,
    scale: float | Float[Array, ""],
    up: str = "...r,ro->...o",
) -> Float[Array, "..."]:
    """`scale * h @ B`, which is added to `x @ W`; h is the masked `(x @ A) * m`."""
    return einsum.product(up, h * jnp.asarray(scale, h.dtype), b)


def merged_kernel(
    w: Float[Array, "..."],
    a: Float[Array, "..."],
    b: Float[Array, "..."],
    *,
    scale: float | Float[Array, "..."],
    product: str = "ir,ro->io",
) -> Float[Array, "..."]:
    """`W + scale * A @ B` in float32, for a single cast to the final dtype by the caller."""
    f32 = jnp.float32
    # HIGHEST: on a TPU a float32 product would otherwise run in bfloat16 passes.
    ab = jnp.einsum(product, a.astype(f32), b.astype(f32), precision=jax.lax.Precision.HIGHEST)
    # The barrier keeps the compiler from fusing multiply and add, which would round differently
    # from one compilation to the next.
    delta = jax.lax.optimization_barrier(jnp.asarray(scale, f32) * ab)
    return w.astype(f32) + delta
