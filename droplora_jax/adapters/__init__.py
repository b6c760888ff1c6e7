"""Adapter kinds by name: a new one is one file and one line here."""

from droplora_jax.adapters.dora import DoRA
from droplora_jax.adapters.droplora import DropLoRA
from droplora_jax.adapters.learned import Learned

ADAPTERS = {"droplora": DropLoRA, "dora": DoRA, "learned": Learned}
