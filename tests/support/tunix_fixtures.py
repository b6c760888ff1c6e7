"""Tiny models of Tunix, and what they are called with."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx

import droplora_jax as dl

SHAPE = {
    "num_layers": 2,
    "vocab_size": 48,
    "embed_dim": 32,
    "hidden_dim": 40,
    "num_heads": 4,
    "head_dim": 8,
    "num_kv_heads": 2,
}
LIKE_LLAMA = {**SHAPE, "rope_theta": 10_000, "norm_eps": 1e-5}
TARGETS = r"(q|k|v|up|down)_proj$"
KEY = dl.root_key(0)
B, T = 4, 6


def _llama3(rngs: nnx.Rngs) -> nnx.Module:
    from tunix.models.llama3 import model

    return model.Llama3(model.ModelConfig(**LIKE_LLAMA), rngs=rngs)


def _qwen2(rngs: nnx.Rngs) -> nnx.Module:
    from tunix.models.qwen2 import model

    return model.Qwen2(model.ModelConfig(**LIKE_LLAMA, use_tied_embedding=True), rngs=rngs)


def _qwen3(rngs: nnx.Rngs) -> nnx.Module:
    from tunix.models.qwen3 import model

    remat = model.RematConfig.DECODER
    return model.Qwen3(model.ModelConfig(**LIKE_LLAMA, remat_config=remat), rngs=rngs)


MODELS: dict[str, Callable[[nnx.Rngs], nnx.Module]] = {
    "llama3": _llama3,
    "qwen2, tied": _qwen2,
    "qwen3, remat": _qwen3,
}


def tunix_model(name: str) -> nnx.Module:
    """A model with no zeros in it (Tunix's Llama starts with a feed-forward part of zeros)."""
    rng = np.random.default_rng(0)

    def fill(_: Any, parameter: Any) -> Any:
        value = parameter.get_value()
        return parameter.replace(jnp.asarray(rng.normal(0.0, 0.3, value.shape), value.dtype))

    graphdef, parameters, rest = nnx.split(MODELS[name](nnx.Rngs(0)), nnx.Param, ...)
    return nnx.merge(graphdef, nnx.map_state(fill, parameters), rest)


def inputs(tokens: Any) -> dict[str, jax.Array]:
    """The arguments of a call, by name."""
    tokens = jnp.asarray(tokens)
    rows, length = tokens.shape
    causal = jnp.tril(jnp.ones((length, length), bool))
    return {
        "input_tokens": tokens,
        "positions": jnp.broadcast_to(jnp.arange(length), (rows, length)),
        "attention_mask": jnp.broadcast_to(causal, (rows, length, length)),
    }


TOKENS = np.random.default_rng(1).integers(0, SHAPE["vocab_size"], (B, T), dtype=np.int32)


def logits(model: nnx.Module, tokens: Any = TOKENS) -> jax.Array:
    return nnx.jit(lambda model, given: model(cache=None, **given)[0])(model, inputs(tokens))
