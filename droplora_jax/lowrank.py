"""DropLoRA as pure functions: the whole method, and the file to read first.

    y = x @ W + scale * ((x @ A) * m) @ B        A: [I, R]   B: [R, O]   m: mask over R

While training, `rank_mask` prunes the rank dimension at random (arXiv 2508.17337, section 3), so
that every step moves through another low-rank subspace. Evaluation and the merge have no mask:
`W' = W + scale * A @ B`. Without a mask the branch is LoRA (arXiv 2106.09685), exactly.

Letters: `B` batch rows, `T` positions, `R` rank, `I` / `O` a layer's input / output width.
"""

from __future__ import annotations

import itertools
from typing import Any, Literal

import jax
import jax.numpy as jnp
from jax.ad_checkpoint import checkpoint_name
from jaxtyping import Array, Bool, Float, Int, Key, UInt32

from droplora_jax.core import einsum

Granularity = Literal["token", "sequence", "step"]
Sampler = Literal["bernoulli", "exact"]


def kept_ranks(rank: int, drop_rate: float) -> int:
    """How many ranks the `exact` sampler keeps: round((1 - p) * R)."""
    return round((1.0 - drop_rate) * rank)


@jax.named_scope("mask")
def rank_mask(
    mask_key: Key[Array, "*keys"],
    shape: tuple[int, ...],
    *,
    drop_rate: float | Float[Array, ""],
    granularity: Granularity,
    sampler: Sampler,
    rescale: bool,
    dtype: Any,
    kept: int | Int[Array, ""] | None = None,
    rank: int | Int[Array, ""] | None = None,
) -> Float[Array, "*mask"]:
    """Draw the mask `m` that multiplies `x @ A`; 0 where a rank is dropped.

    Args:
      mask_key: one key a row, [B], at `token` and `sequence`; at `sequence` also [B, T], one a
        position, equal within a document; [1] at `step`.
      shape: the shape of `x @ A`, [B, ..., R].
      drop_rate: the probability p in [0, 1) that a rank is dropped; `bernoulli` rounds it to
        a multiple of 2**-16.
      sampler: `bernoulli` keeps each rank with probability 1 - p; `exact` keeps `kept` of them,
        uniformly chosen.
      rescale: scale what is kept by 1 / (1 - p).
      kept: default: `kept_ranks`; where the rate or the rank is traced it has to be given.
      rank: the ranks that are there, where R is padded to that of other layers; `exact` keeps
        only these.

    Returns:
      A mask that broadcasts against `shape`.
    """
    own_shape = shape[1:] if granularity == "token" else shape[-1:]
    if sampler == "exact" and kept is None:
        kept = kept_ranks(int(shape[-1] if rank is None else rank), float(drop_rate))

    def sample(key: Array) -> Array:
        if sampler == "exact":
            return _keep_exactly(_order(key, own_shape, rank), kept)
        return _random_halves(key, own_shape) >= _threshold(drop_rate)

    for _ in range(mask_key.ndim):
        sample = jax.vmap(sample)
    # A byte a rank is cheaper to save for the backward pass than to draw again.
    keep = checkpoint_name(sample(mask_key), "dots")  # [*keys, *own_shape]

    missing = max(len(shape) - keep.ndim, 0)
    keep = keep.reshape(*mask_key.shape, *(1,) * missing, *own_shape)
    return jnp.where(keep, _kept_value(drop_rate, rescale, dtype), jnp.asarray(0, dtype))


def _kept_value(drop_rate: float | Array, rescale: bool, dtype: Any) -> Array:
    return jnp.asarray(1.0 / (1.0 - drop_rate) if rescale else 1.0, dtype)


def _threshold(drop_rate: float | Array) -> Array:
    """Below it, of the numbers of 16 bits, are those that drop."""
    steps = jnp.round(jnp.asarray(drop_rate, jnp.float32) * 2**16)
    return jnp.minimum(steps, 2**16 - 1).astype(jnp.uint32)


def _random_halves(key: Array, shape: tuple[int, ...]) -> Array:
    """Uniform numbers of 16 bits, two from each word that is drawn: words are what costs."""
    *rest, rank = shape
    words = jax.random.bits(key, (*rest, -(-rank // 2)), jnp.uint32)
    return jnp.concatenate([words & 0xFFFF, words >> 16], axis=-1)[..., :rank]


def _order(key: Array, shape: tuple[int, ...], rank: int | Array | None) -> UInt32[Array, "... R"]:
    """Random numbers of which no two are the same, and those of ranks that are not there last."""
    size = shape[-1]
    own = max(size - 1, 1).bit_length()
    index = jnp.arange(size, dtype=jnp.uint32)
    bits = (jax.random.bits(key, shape, jnp.uint32) << own) | index
    missing = jnp.uint32(0) if rank is None else (jnp.arange(size) >= rank).astype(jnp.uint32)
    return (bits & 0x7FFFFFFF) | (missing << 31)


def _keep_exactly(order: Array, kept: int | Array | None) -> Bool[Array, "... R"]:
    """The `kept` ranks that come first: by one sort of numbers, not two of their places."""
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
    dtype: Any,
    rank: int | Int[Array, ""] | None = None,
) -> tuple[Int[Array, "K"], Float[Array, "K"]]:
    """The ranks that an `exact` mask of a whole step keeps, and the values of the mask there.

    A branch of these ranks alone is the masked one without the products that come to nothing.

    Args:
      size: R.
      most: K; beyond `kept` of them the mask is zero. The others are those of `rank_mask`.
    """
    index_K = jnp.argsort(_order(mask_key[0], (size,), rank))[:most]
    there_K = jnp.arange(most) < kept
    return index_K, jnp.where(
        there_K, _kept_value(drop_rate, rescale, dtype), jnp.asarray(0, dtype)
    )


def learned_mask(
    logits: Float[Array, "*stack R"], rank: Int[Array, "*stack"] | None = None
) -> Float[Array, "*stack R"]:
    """The mask of ranks that are kept where sigmoid(logit) >= 1/2, over the share of them.

    The share is a constant to the gradient, which takes the threshold for the sigmoid; where
    nothing is kept there is no branch.

    Args:
      rank: the ranks that are there, where R is padded to that of other layers.
    """
    size = logits.shape[-1]
    there = jnp.ones(size, bool) if rank is None else jnp.arange(size) < rank[..., None]
    soft = jax.nn.sigmoid(logits)
    hard = (soft >= 0.5) & there
    kept, own = (jnp.sum(ranks, axis=-1, keepdims=True) for ranks in (hard, there))
    share = (jnp.maximum(kept, 1) / jnp.maximum(own, 1)).astype(soft.dtype)
    straight_through = hard.astype(soft.dtype) + (soft - jax.lax.stop_gradient(soft))
    return jnp.where(there, straight_through / share, 0)


def take_ranks(factor: Float[Array, "..."], index_K: Int[Array, "K"], axis: int) -> Array:
    """Of a factor, the ranks `index_K`, which lie along `axis`."""
    return jnp.take(factor, index_K, axis, unique_indices=True, mode="clip")


@jax.named_scope("low_rank")
def compress(
    x: Float[Array, "..."], *factors: Float[Array, "..."], down: str = "...i,ir->...r"
) -> list[Float[Array, "..."]]:
    """`x @ A` for the A of every layer that reads `x`, in one product and the dtype of `x`.

    `down` is the product as an einsum, for kernels that are not a plain [I, O].
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
    """The branch that is added to `x @ W`, from the masked `h = (x @ A) * m`: `scale * h @ B`."""
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
    # Apart, or some compilations round once (a fused multiply and add) where others round twice.
    delta = jax.lax.optimization_barrier(jnp.asarray(scale, f32) * ab)
    return w.astype(f32) + delta
