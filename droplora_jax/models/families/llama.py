"""LLaMA (`model_type: llama`): 1, 2, 3, 3.1, 3.2, 3.3, Code Llama and all of that architecture."""

from __future__ import annotations

from droplora_jax.models.config import ModelConfig
from droplora_jax.models.families.base import Family, decoder_config
from droplora_jax.models.families.config_keys import HARMLESS, NEUTRAL, READ, HFConfig


def model_config(hf: HFConfig) -> ModelConfig:
    attention_bias = bool(hf.get("attention_bias", False))
    return decoder_config(
        hf,
        "llama",
        {"max_position_embeddings": 2048},
        qkv_bias=attention_bias,
        o_bias=attention_bias,
        mlp_bias=bool(hf.get("mlp_bias", False)),
    )


FAMILY = Family(
    model_config=model_config,
    read=READ | {"attention_bias", "mlp_bias"},
    harmless=HARMLESS,
    neutral={**NEUTRAL, "sliding_window": (None,), "use_sliding_window": (False, None)},
    buffers=("rotary_emb.inv_freq",),
)
