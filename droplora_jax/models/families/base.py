"""What a model family tells the rest: how to read its configuration, and its tensors' names."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from types import MappingProxyType
from typing import Any

from droplora_jax.core.errors import InputError
from droplora_jax.models.config import ModelConfig
from droplora_jax.nn.rope import SCALINGS, RopeConfig


@dataclass(frozen=True)
class TensorName:
    """The Hugging Face name of a parameter; `{layer}` stands for the layer's index."""

    pattern: str
    transposed: bool = False

    @property
    def stacked(self) -> bool:
        return "{layer}" in self.pattern

    def of_layer(self, layer: int) -> str:
        return self.pattern.format(layer=layer)

    @property
    def module(self) -> str:
        """The name of the module that owns the tensor."""
        return self.pattern.rsplit(".", 1)[0]


@dataclass(frozen=True)
class Family:
    """One family of checkpoints over the one decoder.

    Attributes:
      model_config: the shape, from the `config.json` as a dict.
      names: parameter path to tensor name: the one table for import and export.
      read: configuration keys that `model_config` uses.
      harmless: keys that do not change what the model computes.
      refused: keys whose other values would change it, with the values that are accepted.
      buffers: suffixes of stored tensors that are no parameters.
    """

    model_config: Callable[[Mapping[str, Any]], ModelConfig]
    names: Mapping[str, TensorName]
    read: frozenset[str]
    harmless: frozenset[str]
    refused: Mapping[str, Sequence[Any]]
    buffers: tuple[str, ...] = ()

    def tensor_names(self, config: ModelConfig) -> dict[str, TensorName]:
        """The names of the parameters that a model of this shape has."""
        has = {
            "lm_head.kernel": not config.tie_embeddings,
            **{f"layers.{name}_proj.bias": config.qkv_bias for name in ("q", "k", "v")},
            "layers.o_proj.bias": config.o_bias,
            **{f"layers.{name}_proj.bias": config.mlp_bias for name in ("gate", "up", "down")},
            **{f"layers.{name}_norm.scale": config.qk_norm for name in ("q", "k")},
        }
        return {path: name for path, name in self.names.items() if has.get(path, True)}

    def check_keys(self, hf: Mapping[str, Any], where: str, ignore: Sequence[str] = ()) -> None:
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


def _layer(name: str, of: str = "weight") -> TensorName:
    transposed = name.endswith("_proj") and of == "weight"
    return TensorName(f"model.layers.{{layer}}.{name}.{of}", transposed=transposed)


# How LLaMA's tensors are called, and those of all the families that follow it.
NAMES = {
    "embed.embedding": TensorName("model.embed_tokens.weight"),
    "layers.attention_norm.scale": _layer("input_layernorm"),
    **{
        f"layers.{name}_proj.{ours}": _layer(f"{block}.{name}_proj", theirs)
        for block, names in {"self_attn": "qkvo", "mlp": ("gate", "up", "down")}.items()
        for name in names
        for ours, theirs in {"kernel": "weight", "bias": "bias"}.items()
    },
    "layers.q_norm.scale": _layer("self_attn.q_norm"),
    "layers.k_norm.scale": _layer("self_attn.k_norm"),
    "layers.mlp_norm.scale": _layer("post_attention_layernorm"),
    "final_norm.scale": TensorName("model.norm.weight"),
    "lm_head.kernel": TensorName("lm_head.weight", transposed=True),
}

# The keys of `config.json` that all these families have.
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


def decoder_config(
    hf: Mapping[str, Any], family: str, defaults: Mapping[str, Any], **features: Any
) -> ModelConfig:
    """The shape that the common keys describe.

    Args:
      defaults: of the family, for keys that `hf` lacks.
      features: what else a `ModelConfig` has.
    """
    given = {"rms_norm_eps": 1e-6, **defaults, **hf}
    width, heads = whole(given, "hidden_size"), whole(given, "num_attention_heads")
    if given.get("num_key_value_heads") is None:
        given["num_key_value_heads"] = heads
    if given.get("head_dim") is None:
        given["head_dim"] = width // heads
    return ModelConfig(
        family=family,
        vocab_size=whole(given, "vocab_size"),
        width=width,
        layers=whole(given, "num_hidden_layers"),
        heads=heads,
        kv_heads=whole(given, "num_key_value_heads"),
        head_dim=whole(given, "head_dim"),
        ffn=whole(given, "intermediate_size"),
        norm_epsilon=positive(given, "rms_norm_eps"),
        rope=rope_config(given),
        tie_embeddings=bool(given.get("tie_word_embeddings", False)),
        max_positions=whole(given, "max_position_embeddings"),
        **features,
    )


# What `windows` reads.
WINDOW_KEYS = frozenset(
    {"layer_types", "max_window_layers", "sliding_window", "use_sliding_window"}
)


def windows(hf: Mapping[str, Any]) -> tuple[int | None, ...]:
    """The window of each layer as Qwen describes them: `layer_types`, or from a layer on."""
    layers = whole(hf, "num_hidden_layers")
    given = {"sliding_window": 4096, "max_window_layers": 28, **hf}
    if not given.get("use_sliding_window") or given["sliding_window"] is None:
        return ()
    window, first = whole(given, "sliding_window"), given["max_window_layers"]
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


def whole(hf: Mapping[str, Any], key: str) -> int:
    """A configuration value that must be a positive whole number."""
    value = hf[key]
    if not isinstance(value, int) or isinstance(value, bool) or value < 1:
        raise InputError(f"{key}={value!r}: must be a positive whole number")
    return value


def positive(hf: Mapping[str, Any], key: str) -> float:
    """A configuration value that must be a positive number."""
    value = hf[key]
    if not isinstance(value, int | float) or isinstance(value, bool) or not value > 0:
        raise InputError(f"{key}={value!r}: must be a positive number")
    return float(value)


def rope_config(hf: Mapping[str, Any]) -> RopeConfig:
    """The rotary settings, in the old spelling (`rope_theta` + `rope_scaling`) or the new one."""
    settings = dict(hf.get("rope_parameters") or {})
    settings |= hf.get("rope_scaling") or {}
    theta = positive({"rope_theta": 10_000.0, **hf, **settings}, "rope_theta")
    settings.pop("rope_theta", None)
    kind = settings.pop("rope_type", settings.pop("type", "default"))
    settings.pop("type", None)
    settings = {name: value for name, value in settings.items() if value is not None}
    if kind not in SCALINGS:
        raise InputError(
            f"rotary scaling {kind!r} is not supported; supported: {', '.join(SCALINGS)}"
        )
    required, optional = SCALINGS[kind].required, SCALINGS[kind].optional
    # What the model was made for stands beside the settings, not in them.
    for name in ("max_position_embeddings", "original_max_position_embeddings"):
        if name in required and "max_position_embeddings" in hf:
            settings.setdefault(name, hf["max_position_embeddings"])
    if missing := [name for name in required if name not in settings]:
        raise InputError(f"rotary scaling {kind!r} lacks {', '.join(missing)}")
    if unknown := [name for name in settings if name not in (*required, *optional)]:
        raise InputError(f"rotary scaling {kind!r} has unknown keys {', '.join(unknown)}")
    read = {"truncate": lambda settings, name: float(bool(settings[name]))}
    parameters = tuple(
        (name, read.get(name, positive)(settings, name))
        for name in (*required, *optional)
        if name in settings
    )
    return RopeConfig(theta=theta, kind=kind, parameters=parameters)
