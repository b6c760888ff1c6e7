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
from jaxtyping import Array, Bool, Float, Int, Key

from droplora_jax import ops

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
    drop_rate: float,
    granularity: Granularity,
    sampler: Sampler,
    rescale: bool,
    dtype: Any,
    rank: Int[Array, ""] | None = None,
) -> Float[Array, "*mask"]:
    """Draw the mask `m` that multiplies `x @ A`; 0 where a rank is dropped.

    Args:
      mask_key: one key a row, [B], at `token` and `sequence`; at `sequence` also [B, T], one a
        position, equal within a document; [1] at `step`.
      shape: the shape of `x @ A`, [B, ..., R].
      drop_rate: the probability p in [0, 1) that a rank is dropped; `bernoulli` rounds it to
        a multiple of 2**-16.
      sampler: `bernoulli` keeps each rank with probability 1 - p; `exact` keeps
        round((1 - p) * R) of them, uniformly chosen.
      rescale: scale what is kept by 1 / (1 - p).
      rank: the ranks that are there, where R is padded to that of other layers; `exact` counts
        and keeps only these.

    Returns:
      A mask that broadcasts against `shape`.
    """
    own_shape = shape[1:] if granularity == "token" else shape[-1:]
    threshold = jnp.uint32(min(round(drop_rate * 2**16), 2**16 - 1))

    def sample(key: Array) -> Array:
        if sampler == "exact":
            return _keep_exactly(key, own_shape, drop_rate, rank)
        return _random_halves(key, own_shape) >= threshold

    for _ in range(mask_key.ndim):
        sample = jax.vmap(sample)
    # A byte a rank is cheaper to save for the backward pass than to draw again.
    keep = checkpoint_name(sample(mask_key), "dots")  # [*keys, *own_shape]

    missing = max(len(shape) - keep.ndim, 0)
    keep = keep.reshape(*mask_key.shape, *(1,) * missing, *own_shape)
    kept_value = 1.0 / (1.0 - drop_rate) if rescale else 1.0
    return jnp.where(keep, jnp.asarray(kept_value, dtype), jnp.asarray(0, dtype))


def _random_halves(key: Array, shape: tuple[int, ...]) -> Array:
    """Uniform numbers of 16 bits, two from each word that is drawn: words are what costs."""
    *rest, rank = shape
    words = jax.random.bits(key, (*rest, -(-rank // 2)), jnp.uint32)
    return jnp.concatenate([words & 0xFFFF, words >> 16], axis=-1)[..., :rank]


def _keep_exactly(
    key: Array, shape: tuple[int, ...], drop_rate: float, rank: Array | None
) -> Bool[Array, "... R"]:
    # A position in the sorted order, not a threshold: equal bits must not keep one rank too many.
    order = jnp.argsort(_shuffled(key, shape, rank), axis=-1)
    return order < _count(shape[-1], drop_rate, rank)


def _shuffled(key: Array, shape: tuple[int, ...], rank: Array | None) -> Int[Array, "... R"]:
    """The ranks in a random order, those that are not there last."""
    bits = jax.random.bits(key, shape, jnp.uint32)
    if rank is not None:
        padding = jnp.arange(shape[-1]) >= rank
        bits = jnp.where(padding, jnp.uint32(2**32 - 1), bits)  # and the sort is stable
    return jnp.argsort(bits, axis=-1)


def _count(size: int, drop_rate: float, rank: Array | None) -> int | Int[Array, ""]:
    """How many ranks are kept: of `size`, or of the `rank` that are there."""
    if rank is None:
        return kept_ranks(size, drop_rate)
    counts = [kept_ranks(there, drop_rate) for there in range(size + 1)]
    return jnp.asarray(counts, jnp.int32)[rank]


@jax.named_scope("mask")
def subspace(
    mask_key: Key[Array, "1"],
    size: int,
    *,
    drop_rate: float,
    rescale: bool,
    dtype: Any,
    rank: Int[Array, ""] | None = None,
) -> tuple[Int[Array, "K"], Float[Array, "K"]]:
    """The ranks that an `exact` mask of a whole step keeps, and the values of the mask there.

    A branch of these ranks alone is the masked one without the products that come to nothing.

    Args:
      size: R. The others are those of `rank_mask`.
    """
    kept = kept_ranks(size, drop_rate)
    index_K = _shuffled(mask_key[0], (size,), rank)[:kept]
    there_K = jnp.arange(kept) < _count(size, drop_rate, rank)
    kept_value = 1.0 / (1.0 - drop_rate) if rescale else 1.0
    return index_K, jnp.where(there_K, jnp.asarray(kept_value, dtype), jnp.asarray(0, dtype))


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
    h = checkpoint_name(ops.product(down, x, a), "dots")  # [..., sum of R]
    ends = list(itertools.accumulate(factor.shape[-1] for factor in factors))
    return jnp.split(h, ends[:-1], axis=-1)


@jax.named_scope("low_rank")
def lowrank_delta(
    h: Float[Array, "..."],
    b: Float[Array, "..."],
    *,
    scale: float | Float[Array, ""],
    mask: Float[Array, "..."] | None = None,
    up: str = "...r,ro->...o",
) -> Float[Array, "..."]:
    """The branch that is added to `x @ W`, from `h = x @ A`: `scale * (h * m) @ B`."""
    if mask is not None:
        h = h * mask
    return ops.product(up, h * jnp.asarray(scale, h.dtype), b)


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
