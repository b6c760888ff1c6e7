"""The keys of a `config.json` that are known, by what they do to the model.

They are those of the configurations and the generation settings of transformers 4.28 to 5, and the
marks that trainers leave. A key that is in none of the tables may change what the model computes.
"""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from types import MappingProxyType
from typing import Any

from droplora_jax.core.errors import InputError

HFConfig = Mapping[str, Any]  # the values of a `config.json`

# What the shape of every family's decoder is read from.
READ = frozenset(
    {
        "head_dim",
        "hidden_size",
        "intermediate_size",
        "max_position_embeddings",
        "num_attention_heads",
        "num_hidden_layers",
        "num_key_value_heads",
        "original_max_position_embeddings",
        "rms_norm_eps",
        "rope_parameters",
        "rope_scaling",
        "rope_theta",
        "tie_word_embeddings",
        "vocab_size",
    }
)

# How a model is asked, which is said again in `generation_config.json`; this program has options.
GENERATION = frozenset(
    {
        "_from_model_config",
        "assistant_confidence_threshold",
        "assistant_early_exit",
        "assistant_ensemble_weight",
        "assistant_lookbehind",
        "bad_words_ids",
        "begin_suppress_tokens",
        "bos_token_id",
        "cache_config",
        "cache_implementation",
        "compile_config",
        "constraints",
        "continuous_batching_config",
        "decoder_start_token_id",
        "disable_compile",
        "diversity_penalty",
        "do_sample",
        "dola_layers",
        "early_stopping",
        "encoder_no_repeat_ngram_size",
        "encoder_repetition_penalty",
        "eos_token_id",
        "epsilon_cutoff",
        "eta_cutoff",
        "exponential_decay_length_penalty",
        "force_words_ids",
        "forced_bos_token_id",
        "forced_decoder_ids",
        "forced_eos_token_id",
        "generation_kwargs",
        "guidance_scale",
        "is_assistant",
        "length_penalty",
        "low_memory",
        "max_cache_len",
        "max_length",
        "max_matching_ngram_size",
        "max_new_tokens",
        "max_time",
        "min_length",
        "min_new_tokens",
        "min_p",
        "no_repeat_ngram_size",
        "num_assistant_tokens",
        "num_assistant_tokens_schedule",
        "num_beam_groups",
        "num_beams",
        "num_return_sequences",
        "output_logits",
        "output_scores",
        "pad_token_id",
        "penalty_alpha",
        "prefill_chunk_size",
        "prompt_lookup_num_tokens",
        "remove_invalid_values",
        "renormalize_logits",
        "repetition_penalty",
        "return_dict_in_generate",
        "return_legacy_cache",
        "sep_token_id",
        "sequence_bias",
        "speculation_type",
        "stop_strings",
        "suppress_tokens",
        "target_lookbehind",
        "temperature",
        "token_healing",
        "top_h",
        "top_k",
        "top_p",
        "typical_p",
        "unk_token_id",
        "use_cache",
        "use_mtp",
        "watermarking_config",
    }
)

# How transformers makes and runs its module, other heads than the language model's, and names.
OF_TRANSFORMERS = frozenset(
    {
        "_attn_implementation",
        "_attn_implementation_autoset",
        "_attn_implementation_internal",
        "_commit_hash",
        "_experts_implementation",
        "_experts_implementation_internal",
        "_flash_attn_2_enabled",
        "_name_or_path",
        "_output_attentions",
        "architectures",
        "attn_implementation",
        "auto_map",  # code beside a known `model_type`, which is not run
        "dtype",
        "experts_implementation",
        "finetuning_task",
        "gradient_checkpointing",
        "id2label",
        "initializer_range",
        "is_decoder",
        "keys_to_ignore_at_inference",
        "label2id",
        "model_type",
        "name_or_path",
        "num_labels",
        "output_attentions",
        "output_hidden_states",
        "prefix",
        "pretraining_tp",
        "problem_type",
        "return_dict",
        "task_specific_params",
        "tf_legacy_loss",
        "tie_last_hidden_states",
        "tokenizer_class",
        "torch_dtype",
        "torchscript",
        "transformers_version",
        "transformers_weights",
        "use_bfloat16",
        "use_flash_attention_2",
        "xla_device",
    }
)

# What trainers, converters and other runtimes leave.
MARKS = frozenset(
    {
        "_model_name_or_path",
        "internal_version",
        "is_llama_config",
        "max_sequence_length",
        "model_max_length",
        "transformers.js_config",
        "unsloth_fixed",
        "unsloth_version",
    }
)

HARMLESS = GENERATION | OF_TRANSFORMERS | MARKS

# Keys that could change what the model computes, with the values at which they do not.
NEUTRAL: Mapping[str, Sequence[Any]] = MappingProxyType(
    {
        "add_cross_attention": (False, None),
        "attention_dropout": (0, None),
        "chunk_size_feed_forward": (0, None),
        "cross_attention_hidden_size": (None,),
        "hidden_act": ("silu", "swish"),
        "is_encoder_decoder": (False, None),
        "partial_rotary_factor": (1, None),
        "per_layer_config": (None, {}),
        "pruned_heads": (None, {}),
        "rope_interleaved": (False, None),
        "tie_encoder_decoder": (False, None),
    }
)

# Keys that hold how the stored weights were quantised.
QUANTIZED = ("quantization_config", "compression_config", "quantization")


class UnfitConfigKeys(InputError):
    """Keys of a `config.json` that may change, or do change, what a model computes.

    Args:
      refused: why, for each key that is known.
      unknown: the other keys, with their values.
      setting: lets the keys pass, as the caller spells it.

    Attributes:
      keys: all of them.
    """

    def __init__(
        self,
        where: str,
        refused: Mapping[str, str],
        unknown: HFConfig,
        setting: str | None = None,
    ) -> None:
        self.where, self.refused, self.unknown = where, refused, unknown
        self.keys = (*refused, *unknown)
        setting = setting or f"ignore_config_keys={json.dumps(self.keys)}"
        super().__init__(*self._lines(setting))

    def said_as(self, setting: str) -> UnfitConfigKeys:
        """The same for a caller with another spelling."""
        return UnfitConfigKeys(self.where, self.refused, self.unknown, setting)

    def _lines(self, setting: str) -> list[str]:
        lines = [f"{self.where}: {reason}" for reason in self.refused.values()]
        if self.unknown:
            values = ", ".join(f"{key!r} ({shortened(v)})" for key, v in self.unknown.items())
            noun = "unknown key" if len(self.unknown) == 1 else "unknown keys"
            lines.append(f"{self.where}: {noun} {values}: may change what the model computes")
        pronoun = "it changes" if len(self.keys) == 1 else "they change"
        lines[-1] += f". If you know that {pronoun} nothing in your use: {setting}"
        return lines


def check_keys(
    hf: HFConfig, where: str, known: frozenset[str], neutral: Mapping[str, Sequence[Any]]
) -> None:
    """Raise InputError for the keys that are refused or not known, all of them at once."""
    check_unquantized(hf, where)
    refused, unknown = {}, {}
    for key, value in hf.items():
        if key in known or key in QUANTIZED:
            continue
        if key not in neutral:
            unknown[key] = value
        elif value not in neutral[key]:
            supported = ", ".join(map(repr, neutral[key]))
            refused[key] = f"{key}={shortened(value)} is not supported; supported: {supported}"
    if refused or unknown:
        raise UnfitConfigKeys(where, refused, unknown)


def check_unquantized(hf: HFConfig, where: str) -> None:
    """Raise InputError if the weights beside a `config.json` are quantised."""
    for key in QUANTIZED:
        if settings := hf.get(key):
            kind, original = _quantization(settings), hf.get("_name_or_path")
            name = f" (config.json names {original})" if original else ""
            raise InputError(
                f"{where}: {key}: the weights are stored quantised{kind}, and only float16, "
                f"bfloat16 and float32 are read. Name the model that they were made from{name}; to "
                "train on a base in 4 or 8 bits, let it be quantised as it is read: "
                'quantize="nf4" (model.quantize=nf4 in a run)'
            )


def _quantization(settings: object) -> str:
    """The method and the bits that quantisation settings name, in brackets."""
    if not isinstance(settings, Mapping):
        return ""
    method = settings.get("quant_method") or settings.get("quant_algo")
    bits = settings.get("bits") or next(
        (bits for bits in (4, 8) if settings.get(f"load_in_{bits}bit")), None
    )
    words = [str(method)] if method else []
    words += [f"{bits} bits"] if bits else []
    return f" ({', '.join(words)})" if words else ""


def shortened(value: object, longest: int = 60) -> str:
    """A value as it would be written, cut where it is long."""
    text = repr(value)
    return text if len(text) <= longest else f"{text[: longest - 3]}..."
