"""Output formats by name: a new one is one file and one line here."""

from droplora_jax.export.factors import factors
from droplora_jax.export.merged import MergeReport, save_merged
from droplora_jax.export.peft import adapter_config, load_adapter, save_adapter
from droplora_jax.export.truncated import Truncation, truncated

EXPORTERS = {"merged": save_merged, "peft": save_adapter}

__all__ = [
    "EXPORTERS",
    "MergeReport",
    "Truncation",
    "adapter_config",
    "factors",
    "load_adapter",
    "save_adapter",
    "save_merged",
    "truncated",
]
