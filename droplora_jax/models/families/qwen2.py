"""Qwen2 and Qwen2.5 (`model_type: qwen2`): LLaMA with biases on q, k and v."""

from __future__ import annotations

from droplora_jax.models.config import ModelConfig
from droplora_jax.models.families.base import (
    HARMLESS,
    READ,
    REFUSED,
    WINDOW_KEYS,
    Family,
    HFConfig,
    decoder_config,
    windows,
)


def model_config(hf: HFConfig) -> ModelConfig:
    defaults = {"num_key_value_heads": 32, "max_position_embeddings": 32_768}
    return decoder_config(hf, "qwen2", defaults, qkv_bias=True, windows=windows(hf))


FAMILY = Family(
    model_config=model_config,
    read=READ | WINDOW_KEYS,
    harmless=HARMLESS,
    refused={**REFUSED, "use_mrope": (False,)},
    buffers=("rotary_emb.inv_freq",),
)
