"""Hugging Face and PEFT folders, in and out; output formats by name.

A new format is one file and one line here.
"""

from droplora_jax.hf.merged import save_merged
from droplora_jax.hf.peft.adapter import save_adapter

EXPORTERS = {"merged": save_merged, "peft": save_adapter}
