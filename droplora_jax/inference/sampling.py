"""The next token from its logits.

Letters: `B` batch, `V` vocabulary, `C` candidates: the vocabulary, or the k most likely of it.
"""

from __future__ import annotations

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float, Int, Key

from droplora_jax.inference.config import Sampling


def sample(
    logits_BV: Float[Array, "B V"], keys_B: Key[Array, "B"], sampling: Sampling
) -> Int[Array, "B"]:
    """One token a row, in float32; each row has its own key and depends on no other."""
    if sampling.temperature == 0:
        return jnp.argmax(logits_BV, axis=-1).astype(jnp.int32)
    scores_BC, ids_BC = candidates(logits_BV, sampling)
    drawn_B = jax.vmap(jax.random.categorical)(keys_B, scores_BC)
    if ids_BC is None:
        return drawn_B.astype(jnp.int32)
    return jnp.take_along_axis(ids_BC, drawn_B[:, None], axis=1)[:, 0]


def candidates(
    logits_BV: Float[Array, "B V"], sampling: Sampling
) -> tuple[Float[Array, "B C"], Int[Array, "B C"] | None]:
    """Unnormalised log-probabilities, -inf for what is filtered out, and of which tokens.

    None stands for all tokens in order.
    """
    scores_BC, ids_BC = logits_BV.astype(jnp.float32) / sampling.temperature, None
    if sampling.top_k is not None:
        scores_BC, ids_BC = jax.lax.top_k(scores_BC, min(sampling.top_k, scores_BC.shape[1]))
    if sampling.top_p is not None:
        # From the least likely on, as the small probabilities add up best.
        rising_BC = jnp.flip(scores_BC, axis=1) if sampling.top_k else jnp.sort(scores_BC, axis=1)
        total_BC = jnp.cumsum(jax.nn.softmax(rising_BC, axis=1), axis=1)
        kept_BC = (total_BC > 1 - sampling.top_p).at[:, -1].set(True)
        least_B1 = jnp.min(jnp.where(kept_BC, rising_BC, jnp.inf), axis=1, keepdims=True)
        scores_BC = jnp.where(scores_BC < least_B1, -jnp.inf, scores_BC)
    return scores_BC, ids_BC
