"""Kernels of GPUs where there is none: computed by plain products, or traced only."""

from __future__ import annotations

import jax
import jax.numpy as jnp
import numpy as np

from droplora_jax.nn.attention import tokamax
from droplora_jax.nn.attention.cudnn import cudnn_attention


def plain_cudnn(monkeypatch) -> None:
    """Computes what is asked of cuDNN by XLA's products."""
    plain = jax.nn.dot_product_attention

    def instead(*arguments, implementation, **options):
        assert implementation == "cudnn"
        return plain(*arguments, implementation="xla", **options)

    monkeypatch.setattr(jax.nn, "dot_product_attention", instead)


def traced_cudnn(monkeypatch):
    """The kernel, which can be traced and lowered where no cuDNN is installed."""
    from jax._src.cudnn import fused_attention_stablehlo

    monkeypatch.setattr(fused_attention_stablehlo, "check_cudnn_version", lambda: 91500)
    return cudnn_attention


def plain_tokamax(monkeypatch) -> None:
    """Computes what is asked of tokamax by plain products."""

    def tokamax_forward(q, k, v, first):
        y, scores = _from_first(q, k, v, first)
        return y, (scores.max(axis=-1), jnp.exp(scores).sum(axis=-1))

    def tokamax_backward(q, k, v, first, y, softmax, dy):
        return jax.vjp(lambda *qkv: _from_first(*qkv, first)[0], q, k, v)[1](dy)

    for function in (tokamax_forward, tokamax_backward):
        monkeypatch.setattr(tokamax, function.__name__, jax.jit(function))


def _from_first(q_BTNH, k_BTKH, v_BTKH, first_BT):
    """Attention to keys from the first one that a position sees."""
    groups = q_BTNH.shape[2] // k_BTKH.shape[2]
    k, v = (jnp.repeat(x, groups, axis=2) for x in (k_BTKH, v_BTKH))
    keys, queries = np.arange(q_BTNH.shape[1]), np.arange(q_BTNH.shape[1])[:, None]
    visible_BTS = jnp.broadcast_to(keys <= queries, (len(q_BTNH), len(keys), len(keys)))
    if first_BT is not None:
        visible_BTS = visible_BTS & (keys >= first_BT[:, :, None])
    scores = jnp.einsum("BTNH,BSNH->BNTS", q_BTNH, k) * q_BTNH.shape[3] ** -0.5
    scores = jnp.where(visible_BTS[:, None], scores, -jnp.inf)
    return jnp.einsum("BNTS,BSNH->BTNH", jax.nn.softmax(scores), v), scores
