"""The rotary settings of a `config.json`, in the old spelling and the new one."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from droplora_jax.core.errors import InputError
from droplora_jax.models.families.config_keys import HFConfig
from droplora_jax.models.families.values import positive_float, positive_int
from droplora_jax.nn.rope import ORIGINAL, SCALINGS, RopeConfig

DEFAULT_THETA = 10_000.0
# Settings that no scaling computes with, though published models have them.
UNUSED = {"finetuned", "type", "rope_type", "rope_theta"}


def rope_config(hf: HFConfig) -> RopeConfig:
    """The rotary settings: `rope_theta` and `rope_scaling`, or `rope_parameters` with both in it.

    Raises:
      InputError: a scaling that is not known, or settings in both spellings that differ.
    """
    old, new = hf.get("rope_scaling") or {}, hf.get("rope_parameters") or {}
    if not new:
        return _rope_config(hf, old)
    config = _rope_config(hf, new)
    theta = hf.get("rope_theta")
    if old and _rope_config(hf, old) != config:
        raise InputError(
            f"rope_scaling={old!r} beside rope_parameters={new!r}: transformers takes "
            "rope_scaling alone, with the rope_theta beside it or else 10,000, and drops "
            "rope_parameters. Leave one of them in the file: to mean both, write the keys of "
            "rope_scaling into rope_parameters"
        )
    if theta is not None and theta != config.theta:
        raise InputError(
            f"rope_theta={theta!r} beside rope_parameters={new!r}: transformers 5 takes the "
            "rope_theta within rope_parameters, version 4 the one beside them. Leave the right one "
            "in the file"
        )
    return config


def trained_positions(hf: HFConfig, rope: RopeConfig) -> int:
    """How many positions a model is made for.

    With YaRN they are the original ones times the factor: published configurations often leave
    `max_position_embeddings` as it was before the scaling was added.
    """
    positions = positive_int(hf, "max_position_embeddings")
    if rope.kind != "yarn":
        return positions
    given = dict(rope.parameters)
    return max(positions, int(given["factor"] * given[ORIGINAL]))


def _rope_config(hf: HFConfig, spelled: Mapping[str, Any]) -> RopeConfig:
    kind = spelled.get("rope_type", spelled.get("type")) or "default"
    if kind not in SCALINGS:
        raise InputError(
            f"rotary scaling {kind!r} is not supported; supported: {', '.join(SCALINGS)}"
        )
    beside = {"rope_theta": hf.get("rope_theta")}
    thetas = {name: value for name, value in {**beside, **spelled}.items() if value is not None}
    theta = positive_float({"rope_theta": DEFAULT_THETA, **thetas}, "rope_theta")
    settings = {
        name: value for name, value in spelled.items() if value is not None and name not in UNUSED
    }
    settings = _with_lengths(hf, _without_neutral(kind, settings), kind)
    required, optional = SCALINGS[kind].required, SCALINGS[kind].optional
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


def _without_neutral(kind: str, settings: Mapping[str, Any]) -> dict[str, Any]:
    """Without settings at values that change nothing.

    Raises:
      InputError: a factor without a scaling.
    """
    settings = dict(settings)
    if settings.get("partial_rotary_factor") == 1:
        del settings["partial_rotary_factor"]
    if kind in ("default", "linear"):
        settings.pop(ORIGINAL, None)
    if kind == "default" and "factor" in settings and settings.pop("factor") != 1:
        raise InputError(
            "rotary scaling 'default' with a factor other than 1: it would be ignored. Name the "
            "scaling (rope_type), or take the factor out"
        )
    return settings


def _with_lengths(hf: HFConfig, settings: dict[str, Any], kind: str) -> dict[str, Any]:
    """With the length that the model was trained for, which is a key beside the settings."""
    beside, within = hf.get(ORIGINAL), settings.get(ORIGINAL)
    if beside is not None and within is not None and beside != within:
        raise InputError(
            f"{ORIGINAL}={beside!r}, but {within!r} in the rotary settings: leave one of them"
        )
    required = SCALINGS[kind].required
    if beside is not None and ORIGINAL in required:
        settings = {**settings, ORIGINAL: beside}
    for name in ("max_position_embeddings", ORIGINAL):
        if name in required and "max_position_embeddings" in hf:
            settings = {name: hf["max_position_embeddings"], **settings}
    return settings
