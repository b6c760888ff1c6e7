"""Qwen3 (`model_type: qwen3`): LLaMA with normed queries and keys, and heads of any width."""

from __future__ import annotations

from droplora_jax.models.config import ModelConfig
from droplora_jax.models.families.base import WINDOW_KEYS, Family, decoder_config, windows
from droplora_jax.models.families.config_keys import HARMLESS, NEUTRAL, READ, HFConfig


def model_config(hf: HFConfig) -> ModelConfig:
    bias = bool(hf.get("attention_bias", False))
    return decoder_config(
        hf,
        "qwen3",
        {"num_key_value_heads": 32, "head_dim": 128, "max_position_embeddings": 32_768},
        qkv_bias=bias,
        o_bias=bias,
        qk_norm=True,
        windows=windows(hf),
    )


FAMILY = Family(
    model_config=model_config,
    read=READ | WINDOW_KEYS | {"attention_bias"},
    harmless=HARMLESS,
    neutral={**NEUTRAL, "mlp_bias": (False, None)},
)
