"""What a model family tells the rest: how to read its configuration, and its tensors' names."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from droplora_jax.errors import InputError
from droplora_jax.models.decoder import ModelConfig
from droplora_jax.rope import SCALINGS, RopeConfig


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
        tied = {"lm_head.kernel"} if config.tie_embeddings else set()
        return {path: name for path, name in self.names.items() if path not in tied}

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
