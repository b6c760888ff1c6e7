"""Qwen2 and Qwen2.5 (`model_type: qwen2`): LLaMA with biases on q, k and v."""

from __future__ import annotations

from droplora_jax.models.config import ModelConfig
from droplora_jax.models.families.base import WINDOW_KEYS, Family, decoder_config, windows
from droplora_jax.models.families.config_keys import HARMLESS, NEUTRAL, READ, HFConfig


def model_config(hf: HFConfig) -> ModelConfig:
    defaults = {"num_key_value_heads": 32, "max_position_embeddings": 32_768}
    return decoder_config(hf, "qwen2", defaults, qkv_bias=True, windows=windows(hf))


FAMILY = Family(
    model_config=model_config,
    read=READ | WINDOW_KEYS,
    harmless=HARMLESS | {"attention_bias"},  # q, k and v have one, whatever it says
    neutral={**NEUTRAL, "mlp_bias": (False, None), "use_mrope": (False, None)},
    buffers=("rotary_emb.inv_freq",),
)
