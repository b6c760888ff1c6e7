"""How a branch starts: the first A and B of a layer, from a key, or from the layer's kernel.

Letters: `G` what the kernel is batched over (1 if nothing), `I` input, `O` output, `R` rank.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from functools import partial
from types import MappingProxyType

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float, Key

from droplora_jax.adapters.config import FROM_KERNEL, Branch, Init
from droplora_jax.adapters.layout import factor_shapes
from droplora_jax.core import prng
from droplora_jax.nn.linear_spec import LinearSpec
from droplora_jax.nn.quantized_kernel import Quantized, dense

Factors = tuple[Float[Array, "G I R"], Float[Array, "G R O"]]

_exact = jax.lax.Precision.HIGHEST  # on a TPU a float32 product would run in bfloat16 passes


def first_factors(
    init: Init,
    spec: LinearSpec,
    branches: Sequence[Branch],
    shape: tuple[int, ...],
    key: Key[Array, ""] | None,
    kernel: Float[Array, "..."] | Quantized | None,
) -> tuple[Float[Array, "..."], Float[Array, "..."]]:
    """The first A and B of a layer or a stack of them, in float32.

    Args:
      branches: rank and scale of every layer of the stack. The factors are zero beyond a layer's
        own rank.
      shape: of the kernel, stacked axes in front.
      key: of the layer's path; the index in the stack is folded into it here. None: zeros, for
        factors that come from elsewhere.
      kernel: if `init` needs it; None: zeros, as its values are not known yet.
    """
    like = jax.ShapeDtypeStruct(shape, jnp.float32)
    rank = max(branch.rank for branch in branches)
    a_shape, b_shape = factor_shapes(like, spec, rank)
    if key is None or (init in FROM_KERNEL and kernel is None):
        return jnp.zeros(a_shape), jnp.zeros(b_shape)
    stack = spec.stack(like)
    sizes = dict(zip(spec.kernel, shape[len(stack) :], strict=True))
    G, I, O = (  # noqa: E741
        math.prod(sizes[c] for c in letters)
        for letters in (spec.batched, spec.contracted, spec.produced)
    )

    def one(key: Array, layer_rank: Array, scale: Array, w: Array | None) -> Factors:
        a_GIR, b_GRO = INITS[init](key, (G, I, O), rank, layer_rank, scale, w)
        # `where` and no product: a layer without a branch has scale 0, and parts of its kernel over
        # that are not finite.
        in_rank_R = jnp.arange(rank) < layer_rank
        return jnp.where(in_rank_R, a_GIR, 0), jnp.where(in_rank_R[:, None], b_GRO, 0)

    keys = prng.fold_stack(key, stack).reshape(-1)
    ranks = jnp.asarray([branch.rank for branch in branches], jnp.int32)
    scales = jnp.asarray([branch.scale for branch in branches], jnp.float32)
    if init in FROM_KERNEL:
        order = spec.batched + spec.contracted + spec.produced
        kernels = jax.tree.map(lambda x: x.reshape(-1, *x.shape[len(stack) :]), kernel)

        def of_layer(layer: tuple[Array, Array, Array, Array | Quantized]) -> Factors:
            key, layer_rank, scale, kernel = layer
            w = jnp.einsum(f"{spec.kernel}->{order}", dense(kernel)).reshape(G, I, O)
            return one(key, layer_rank, scale, w)

        # One after the other, for the memory of a decomposition.
        a, b = jax.lax.map(of_layer, (keys, ranks, scales, kernels))
    else:
        a, b = jax.vmap(partial(one, w=None))(keys, ranks, scales)
    return a.reshape(a_shape), b.reshape(b_shape)


def _kaiming(key, sizes, rank, layer_rank, scale, w) -> Factors:
    """A uniform in +-1 / sqrt(fan_in): He's bound with a = sqrt(5), as a PyTorch linear layer."""
    G, I, O = sizes  # noqa: E741
    bound = 1.0 / math.sqrt(I)
    a_GIR = jax.random.uniform(key, (G, I, rank), jnp.float32, -bound, bound)
    return a_GIR, jnp.zeros((G, rank, O))


def _gaussian(key, sizes, rank, layer_rank, scale, w) -> Factors:
    """A normal with a standard deviation of 1 / rank."""
    G, I, O = sizes  # noqa: E741
    a_GIR = jax.random.normal(key, (G, I, rank), jnp.float32) / jnp.maximum(layer_rank, 1).astype(
        jnp.float32
    )
    return a_GIR, jnp.zeros((G, rank, O))


def _orthogonal(key, sizes, rank, layer_rank, scale, w) -> Factors:
    """A in the span of half of an orthogonal basis of the ranks, B in that of the other half.

    So A @ B is nothing although neither is. (arXiv 2504.05343 asks for this of LoRA's start.)
    """
    G, I, O = sizes  # noqa: E741
    of_basis, of_a, of_b = jax.random.split(key, 3)
    used_R = jnp.arange(rank) < layer_rank
    square = used_R[:, None] & used_R
    # Padded ranks get an identity block; the caller zeroes them.
    random = jnp.where(square, jax.random.normal(of_basis, (rank, rank)), jnp.eye(rank))
    basis_RR = jnp.linalg.qr(random)[0]
    a = jax.random.normal(of_a, (G, I, rank // 2)) / 10
    b = jax.random.normal(of_b, (G, rank // 2, O)) / 10
    return (
        jnp.einsum("gih,hr->gir", a, basis_RR[0::2], precision=_exact),
        jnp.einsum("hr,gho->gro", basis_RR[1::2], b, precision=_exact),
    )


def _singular(w_GIO: Array, rank: int, scale: Array, *, largest: bool) -> Factors:
    """The `rank` largest or smallest singular triplets, sqrt(s / scale) in each of A and B."""
    u, s, v = jnp.linalg.svd(w_GIO.astype(jnp.float32), full_matrices=False)
    order = slice(rank) if largest else slice(None, -rank - 1, -1)
    root_GR = jnp.sqrt(s[:, order] / scale)
    return u[:, :, order] * root_GR[:, None], v[:, order] * root_GR[..., None]


def _pissa(key, sizes, rank, layer_rank, scale, w) -> Factors:
    """The largest singular values of the kernel (arXiv 2404.02948)."""
    return _singular(w, rank, scale, largest=True)


def _milora(key, sizes, rank, layer_rank, scale, w) -> Factors:
    """The smallest singular values of the kernel (arXiv 2406.09044)."""
    return _singular(w, rank, scale, largest=False)


def _olora(key, sizes, rank, layer_rank, scale, w) -> Factors:
    """The first ranks of the kernel's QR decomposition (arXiv 2406.01775), B orthogonal."""
    q_GOO, r_GOI = jnp.linalg.qr(jnp.swapaxes(w.astype(jnp.float32), 1, 2))
    return jnp.swapaxes(r_GOI[:, :rank], 1, 2), jnp.swapaxes(q_GOO[:, :, :rank], 1, 2)


INITS: Mapping[Init, Callable[..., Factors]] = MappingProxyType(
    {
        "kaiming": _kaiming,
        "gaussian": _gaussian,
        "orthogonal": _orthogonal,
        "pissa": _pissa,
        "milora": _milora,
        "olora": _olora,
    }
)
