"""Adapter kinds by name: a new one is one file and one line here."""

from droplora_jax.adapters.base import Adapter, AdapterConfig
from droplora_jax.adapters.dora import DoRA
from droplora_jax.adapters.droplora import DropLoRA
from droplora_jax.adapters.learned import Learned
from droplora_jax.adapters.options import LowRank

ADAPTERS = {"droplora": DropLoRA, "dora": DoRA, "learned": Learned}

__all__ = [
    "ADAPTERS",
    "Adapter",
    "AdapterConfig",
    "DoRA",
    "DropLoRA",
    "Learned",
    "LowRank",
]
