"""The contract of a model family, and the parts of a `config.json` that families share."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from droplora_jax.core.errors import InputError
from droplora_jax.models.config import ModelConfig
from droplora_jax.models.families.config_keys import HFConfig, check_keys
from droplora_jax.models.families.rotary import rope_config, trained_positions
from droplora_jax.models.families.values import positive_float, positive_int
from droplora_jax.models.parameter_table import TensorName, tensor_names


@dataclass(frozen=True)
class Family:
    """One family of checkpoints over the one decoder.

    A new family is one file and one line. The file, such as `qwen3.py`, defines `model_config`,
    which turns the family's `config.json` into a `ModelConfig` (with `decoder_config` for the keys
    that all families share), and `FAMILY`, a record of this class. The line, in `FAMILIES`, names
    the `model_type`. No other module asks which family a model is of: features such as biases,
    normed queries or windows are fields of `ModelConfig`, and a family that needs a feature which
    no other has adds a field there and its parameters in `models/parameter_table.py`. Every key of
    a `config.json` must be accounted for as read, harmless or neutral at some values, because a
    key that is silently skipped is a model that silently computes something else.
    `tests/contracts/test_families.py` compares each family with transformers.

    Attributes:
      model_config: the shape, from the `config.json` as a dict.
      read: configuration keys that `model_config` uses.
      harmless: keys that do not change what the model computes.
      neutral: keys that could change it, with the values at which they do not.
      buffers: suffixes of stored tensors that are not parameters.
    """

    model_config: Callable[[HFConfig], ModelConfig]
    read: frozenset[str]
    harmless: frozenset[str]
    neutral: Mapping[str, Sequence[Any]]
    buffers: tuple[str, ...] = ()

    def tensor_names(self, config: ModelConfig) -> dict[str, TensorName]:
        """The tensors of the parameters that a model of this shape has, by path."""
        return tensor_names(config)

    def check_keys(self, hf: HFConfig, where: str, ignore: Sequence[str] = ()) -> None:
        """Raise InputError for all configuration keys that are refused or not known."""
        kept = {key: value for key, value in hf.items() if key not in ignore}
        check_keys(kept, where, self.read | self.harmless, self.neutral)


def decoder_config(hf: HFConfig, family: str, defaults: HFConfig, **features: Any) -> ModelConfig:
    """The shape that the common keys describe.

    Args:
      defaults: the family's values for keys that `hf` lacks.
      features: further fields of the `ModelConfig`.
    """
    given = {"rms_norm_eps": 1e-6, **defaults, **hf}
    width, heads = positive_int(given, "hidden_size"), positive_int(given, "num_attention_heads")
    if given.get("num_key_value_heads") is None:
        given["num_key_value_heads"] = heads
    if given.get("head_dim") is None:
        given["head_dim"] = width // heads
    rope = rope_config(given)
    return ModelConfig(
        family=family,
        vocab_size=positive_int(given, "vocab_size"),
        width=width,
        layers=positive_int(given, "num_hidden_layers"),
        heads=heads,
        kv_heads=positive_int(given, "num_key_value_heads"),
        head_dim=positive_int(given, "head_dim"),
        ffn=positive_int(given, "intermediate_size"),
        norm_epsilon=positive_float(given, "rms_norm_eps"),
        rope=rope,
        tie_embeddings=bool(given.get("tie_word_embeddings", False)),
        max_positions=trained_positions(given, rope),
        **features,
    )


# The keys that `windows` reads.
WINDOW_KEYS = frozenset(
    {"layer_types", "max_window_layers", "sliding_window", "use_sliding_window"}
)


def windows(hf: HFConfig) -> tuple[int | None, ...]:
    """The window of each layer as Qwen describes them: `layer_types`, or from a layer on."""
    layers = positive_int(hf, "num_hidden_layers")
    given = {"sliding_window": 4096, "max_window_layers": 28, **hf}
    if not given.get("use_sliding_window") or given["sliding_window"] is None:
        return ()
    window, first = positive_int(given, "sliding_window"), given["max_window_layers"]
    if not isinstance(first, int) or isinstance(first, bool) or first < 0:
        raise InputError(f"max_window_layers={first!r}: must be a whole number, the first layer")
    types = given.get("layer_types") or [
        "sliding_attention" if layer >= first else "full_attention" for layer in range(layers)
    ]
    if len(types) != layers or set(types) - {"sliding_attention", "full_attention"}:
        raise InputError(
            f"layer_types={types!r}: must be {layers} times 'full_attention' or 'sliding_attention'"
        )
    return tuple(window if kind == "sliding_attention" else None for kind in types)
