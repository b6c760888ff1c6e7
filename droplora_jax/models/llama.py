"""LLaMA (`model_type: llama`): 1, 2, 3, 3.1, 3.2, 3.3 and models of the same architecture."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from droplora_jax.models.decoder import ModelConfig
from droplora_jax.models.family import Family, TensorName, positive, rope_config, whole


def model_config(hf: Mapping[str, Any]) -> ModelConfig:
    given = {"rms_norm_eps": 1e-6, "max_position_embeddings": 2048, **hf}
    width, heads = whole(hf, "hidden_size"), whole(hf, "num_attention_heads")
    if given.get("num_key_value_heads") is None:
        given["num_key_value_heads"] = heads
    if given.get("head_dim") is None:
        given["head_dim"] = width // heads
    return ModelConfig(
        family="llama",
        vocab_size=whole(hf, "vocab_size"),
        width=width,
        layers=whole(hf, "num_hidden_layers"),
        heads=heads,
        kv_heads=whole(given, "num_key_value_heads"),
        head_dim=whole(given, "head_dim"),
        ffn=whole(hf, "intermediate_size"),
        norm_epsilon=positive(given, "rms_norm_eps"),
        rope=rope_config(hf),
        tie_embeddings=bool(hf.get("tie_word_embeddings", False)),
        max_positions=whole(given, "max_position_embeddings"),
    )


def _layer(name: str) -> TensorName:
    return TensorName(f"model.layers.{{layer}}.{name}.weight", transposed=name.endswith("_proj"))


NAMES = {
    "embed.embedding": TensorName("model.embed_tokens.weight"),
    "layers.attention_norm.scale": _layer("input_layernorm"),
    "layers.q_proj.kernel": _layer("self_attn.q_proj"),
    "layers.k_proj.kernel": _layer("self_attn.k_proj"),
    "layers.v_proj.kernel": _layer("self_attn.v_proj"),
    "layers.o_proj.kernel": _layer("self_attn.o_proj"),
    "layers.mlp_norm.scale": _layer("post_attention_layernorm"),
    "layers.gate_proj.kernel": _layer("mlp.gate_proj"),
    "layers.up_proj.kernel": _layer("mlp.up_proj"),
    "layers.down_proj.kernel": _layer("mlp.down_proj"),
    "final_norm.scale": TensorName("model.norm.weight"),
    "lm_head.kernel": TensorName("lm_head.weight", transposed=True),
}

READ = frozenset(
    {
        "head_dim",
        "hidden_size",
        "intermediate_size",
        "max_position_embeddings",
        "num_attention_heads",
        "num_hidden_layers",
        "num_key_value_heads",
        "rms_norm_eps",
        "rope_parameters",
        "rope_scaling",
        "rope_theta",
        "tie_word_embeddings",
        "vocab_size",
    }
)

HARMLESS = frozenset(
    {
        "_name_or_path",
        "architectures",
        "bos_token_id",
        "dtype",
        "eos_token_id",
        "initializer_range",
        "max_sequence_length",
        "model_type",
        "pad_token_id",
        "pretraining_tp",
        "torch_dtype",
        "transformers_version",
        "use_cache",
    }
)

REFUSED = {
    "attention_bias": (False,),
    "attention_dropout": (0.0,),
    "hidden_act": ("silu",),
    "mlp_bias": (False,),
    "quantization_config": (None,),
}

FAMILY = Family(
    model_config=model_config,
    names=NAMES,
    read=READ,
    harmless=HARMLESS,
    refused=REFUSED,
    buffers=("rotary_emb.inv_freq",),
)
