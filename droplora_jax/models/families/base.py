"""The contract of a model family, and the parts of a `config.json` that families share."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from types import MappingProxyType
from typing import Any

from droplora_jax.core.errors import InputError
from droplora_jax.models.config import ModelConfig
from droplora_jax.models.parameter_table import TensorName, tensor_names
from droplora_jax.nn.rope import SCALINGS, RopeConfig

HFConfig = Mapping[str, Any]  # the values of a `config.json`


@dataclass(frozen=True)
class Family:
    """One family of checkpoints over the one decoder.

    A new family is one file and one line. The file, such as `qwen3.py`, defines `model_config`,
    which turns the family's `config.json` into a `ModelConfig` (with `decoder_config` for the keys
    that all families share), and `FAMILY`, a record of this class. The line, in `FAMILIES`, names
    the `model_type`. No other module asks which family a model is of: features such as biases,
    normed queries or windows are fields of `ModelConfig`, and a family that needs a feature which
    no other has adds a field there and its parameters in `models/parameter_table.py`. Every key of
    a `config.json` must be accounted for as read, harmless or refused, because a key that is
    silently skipped is a model that silently computes something else.
    `tests/contracts/test_families.py` compares each family with transformers.

    Attributes:
      model_config: the shape, from the `config.json` as a dict.
      read: configuration keys that `model_config` uses.
      harmless: keys that do not change what the model computes.
      refused: keys whose other values would change it, with the values that are accepted.
      buffers: suffixes of stored tensors that are not parameters.
    """

    model_config: Callable[[HFConfig], ModelConfig]
    read: frozenset[str]
    harmless: frozenset[str]
    refused: Mapping[str, Sequence[Any]]
    buffers: tuple[str, ...] = ()

    def tensor_names(self, config: ModelConfig) -> dict[str, TensorName]:
        """The tensors of the parameters that a model of this shape has, by path."""
        return tensor_names(config)

    def check_keys(self, hf: HFConfig, where: str, ignore: Sequence[str] = ()) -> None:
        """Raise InputError for a configuration key that is refused or not known."""
        for key, value in hf.items():
            if key in self.read or key in self.harmless or key in ignore:
                continue
            if key not in self.refused:
                raise InputError(
                    f"{where}: unknown key {key!r} (value {value!r}): it may change what the model "
                    f"computes. If it does not, add it to model.ignore_config_keys"
                )
            accepted = self.refused[key]
            if value not in accepted:
                raise InputError(
                    f"{where}: {key}={value!r} is not supported; supported: "
                    f"{', '.join(map(repr, accepted))}"
                )


# The keys of `config.json` that all families have.
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

REFUSED: Mapping[str, Sequence[Any]] = MappingProxyType(
    {"attention_dropout": (0.0,), "hidden_act": ("silu",), "quantization_config": (None,)}
)


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
        rope=rope_config(given),
        tie_embeddings=bool(given.get("tie_word_embeddings", False)),
        max_positions=positive_int(given, "max_position_embeddings"),
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


def positive_int(hf: HFConfig, key: str) -> int:
    """A configuration value that must be a positive whole number."""
    value = hf[key]
    if not isinstance(value, int) or isinstance(value, bool) or value < 1:
        raise InputError(f"{key}={value!r}: must be a positive whole number")
    return value


def positive_float(hf: HFConfig, key: str) -> float:
    """A configuration value that must be a positive number."""
    value = hf[key]
    if not isinstance(value, int | float) or isinstance(value, bool) or not value > 0:
        raise InputError(f"{key}={value!r}: must be a positive number")
    return float(value)


def rope_config(hf: HFConfig) -> RopeConfig:
    """The rotary settings, in the old spelling (`rope_theta` + `rope_scaling`) or the new one."""
    settings = dict(hf.get("rope_parameters") or {})
    settings |= hf.get("rope_scaling") or {}
    theta = positive_float({"rope_theta": 10_000.0, **hf, **settings}, "rope_theta")
    settings.pop("rope_theta", None)
    kind = settings.pop("rope_type", settings.pop("type", "default"))
    settings.pop("type", None)
    settings = {name: value for name, value in settings.items() if value is not None}
    if kind not in SCALINGS:
        raise InputError(
            f"rotary scaling {kind!r} is not supported; supported: {', '.join(SCALINGS)}"
        )
    required, optional = SCALINGS[kind].required, SCALINGS[kind].optional
    # The length that the model was trained for is a key beside the settings, not among them.
    for name in ("max_position_embeddings", "original_max_position_embeddings"):
        if name in required and "max_position_embeddings" in hf:
            settings.setdefault(name, hf["max_position_embeddings"])
    if missing := [name for name in required if name not in settings]:
        raise InputError(f"rotary scaling {kind!r} lacks {', '.join(missing)}")
    if unknown := [name for name in settings if name not in (*required, *optional)]:
        raise InputError(f"rotary scaling {kind!r} has unknown keys {', '.join(unknown)}")
    read = {"truncate": lambda settings, name: float(bool(settings[name]))}
    parameters = tuple(
        (name, read.get(name, positive_float)(settings, name))
        for name in (*required, *optional)
        if name in settings
    )
    return RopeConfig(theta=theta, kind=kind, parameters=parameters)
