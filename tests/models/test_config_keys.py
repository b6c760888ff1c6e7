"""Keys of a `config.json`: those of transformers are known, others are named all at once."""

from __future__ import annotations

from types import MappingProxyType

import pytest
import transformers

from droplora_jax.core.errors import InputError
from droplora_jax.models.families import FAMILIES
from droplora_jax.models.families.config_keys import UnfitConfigKeys

TYPES = sorted(FAMILIES)
# What older versions of transformers wrote, at its defaults; the newest has them no more.
OLD = MappingProxyType(
    {
        "add_cross_attention": False,
        "begin_suppress_tokens": None,
        "chunk_size_feed_forward": 0,
        "cross_attention_hidden_size": None,
        "decoder_start_token_id": None,
        "finetuning_task": None,
        "forced_decoder_ids": None,
        "generation_kwargs": {},
        "is_decoder": False,
        "is_encoder_decoder": False,
        "num_beam_groups": 1,
        "prefix": None,
        "pruned_heads": {},
        "sep_token_id": None,
        "task_specific_params": None,
        "tf_legacy_loss": False,
        "tie_encoder_decoder": False,
        "tokenizer_class": None,
        "torch_dtype": "float16",
        "torchscript": False,
        "typical_p": 1.0,
        "use_bfloat16": False,
        "xla_device": None,
    }
)
MARKS = MappingProxyType(
    {
        "_attn_implementation_autoset": True,
        "_model_name_or_path": "maker/model",
        "_name_or_path": "maker/model",
        "auto_map": {"AutoModelForCausalLM": "modeling.Model"},
        "internal_version": "7b-v2",
        "is_llama_config": True,
        "rope_interleaved": False,
        "transformers.js_config": {"dtype": "q4"},
        "unk_token_id": 0,
        "unsloth_fixed": True,
        "unsloth_version": "2025.1.5",
        "use_flash_attention_2": True,
    }
)


def check(family: str, /, ignore: tuple[str, ...] = (), **keys: object) -> None:
    FAMILIES[family].check_keys(keys, "config.json", ignore)


@pytest.mark.parametrize("model_type", TYPES)
def test_everything_that_transformers_writes_is_known(model_type):
    config = transformers.AutoConfig.for_model(model_type)
    check(model_type, **config.to_dict())
    check(model_type, **{**config.to_dict(), **OLD})
    check(model_type, **transformers.GenerationConfig(temperature=0.5, max_length=9).to_dict())


@pytest.mark.parametrize("model_type", TYPES)
def test_marks_that_trainers_leave_change_nothing(model_type):
    check(model_type, **MARKS)


def test_all_keys_are_named_at_once_with_what_lets_them_pass():
    keys = {"logit_scale": 2.0, "hidden_act": "gelu", "own_mark": {"a": "b" * 99}}
    with pytest.raises(UnfitConfigKeys) as caught:
        check("llama", **keys, vocab_size=7)
    refused, unknown = str(caught.value).splitlines()
    assert "hidden_act='gelu'" in refused
    assert "'silu'" in refused
    assert "'logit_scale' (2.0), 'own_mark' ({'a'" in unknown
    assert unknown.endswith('ignore_config_keys=["hidden_act", "logit_scale", "own_mark"]')
    assert len(unknown) < 300
    assert str(caught.value.said_as("--flag a b")).endswith(": --flag a b")
    check("llama", ignore=tuple(keys), **keys)


@pytest.mark.parametrize(
    ("model_type", "key", "value"),
    [
        ("llama", "rope_interleaved", True),
        ("llama", "sliding_window", 4096),
        ("llama", "is_encoder_decoder", True),
        ("llama", "attention_dropout", 0.1),
        ("mistral", "attention_bias", True),
        ("qwen2", "mlp_bias", True),
        ("qwen3", "partial_rotary_factor", 0.5),
        ("qwen3", "per_layer_config", {"0": {"num_key_value_heads": 2}}),
    ],
)
def test_a_value_that_changes_the_computation_is_refused(model_type, key, value):
    with pytest.raises(UnfitConfigKeys, match=rf"config\.json: {key}=.*not supported; supported"):
        check(model_type, **{key: value})


@pytest.mark.parametrize(
    ("keys", "words"),
    [
        (
            {
                "quantization_config": {
                    "quant_method": "bitsandbytes",
                    "load_in_4bit": True,
                    "llm_int8_skip_modules": ["lm_head"] * 99,
                }
            },
            "bitsandbytes, 4 bits",
        ),
        ({"quantization_config": {"quant_method": "gptq", "bits": 4}}, "gptq, 4 bits"),
        ({"quantization_config": {"quant_method": "awq", "bits": 4}}, "awq, 4 bits"),
        ({"quantization_config": {"quant_method": "fp8"}}, "fp8"),
        ({"compression_config": {"quant_method": "compressed-tensors"}}, "compressed-tensors"),
        ({"quantization": {"group_size": 64, "bits": 8}}, "8 bits"),
    ],
)
def test_quantised_weights_are_called_so(keys, words):
    with pytest.raises(InputError) as caught:
        check("llama", **keys, _name_or_path="maker/model")
    text = str(caught.value)
    assert f"stored quantised ({words})" in text
    assert "maker/model" in text
    assert "model.quantize=nf4" in text
    assert len(text) < 500
    check("llama", quantization_config=None)
