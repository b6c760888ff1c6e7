"""Single values of a `config.json`, checked."""

from __future__ import annotations

from droplora_jax.core.errors import InputError
from droplora_jax.models.families.config_keys import HFConfig


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
