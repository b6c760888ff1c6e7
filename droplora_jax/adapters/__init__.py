"""Adapter kinds by name: a new one is one file and one line here."""

from droplora_jax.adapters.base import Adapter, AdapterConfig, LinearSpec, MaskKey, linear_spec
from droplora_jax.adapters.dora import DoRA
from droplora_jax.adapters.droplora import DropLoRA

ADAPTERS = {"droplora": DropLoRA, "dora": DoRA}

__all__ = [
    "ADAPTERS",
    "Adapter",
    "AdapterConfig",
    "DoRA",
    "DropLoRA",
    "LinearSpec",
    "MaskKey",
    "linear_spec",
]
