"""Mistral (`model_type: mistral`): LLaMA with a sliding window, in the versions that have one."""

from __future__ import annotations

from droplora_jax.models.config import ModelConfig
from droplora_jax.models.families.base import Family, decoder_config
from droplora_jax.models.families.config_keys import HARMLESS, NEUTRAL, READ, HFConfig
from droplora_jax.models.families.values import positive_int


def model_config(hf: HFConfig) -> ModelConfig:
    given = {"sliding_window": 4096, **hf}
    layers = positive_int(given, "num_hidden_layers")
    window = None if given["sliding_window"] is None else positive_int(given, "sliding_window")
    defaults = {"num_key_value_heads": 8, "max_position_embeddings": 131_072}
    return decoder_config(hf, "mistral", defaults, windows=(window,) * layers if window else ())


FAMILY = Family(
    model_config=model_config,
    read=READ | {"sliding_window"},
    harmless=HARMLESS,
    neutral={**NEUTRAL, "attention_bias": (False, None), "mlp_bias": (False, None)},
    buffers=("rotary_emb.inv_freq",),
)
