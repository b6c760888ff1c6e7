"""Hugging Face and PEFT folders, in and out.

In: `base` finds and checks a base model (`source`), `weight_loading` reads it (`tensor_files`,
`safetensors_file`), `tokenizer` loads its tokenizer and `added_tokens` adds to both; `load` is
`dl.load`. Out: `merged` writes base + adapters and `verify` checks the folder; `peft/` writes and
reads adapters.
"""

# The formats of `droplora export --format`, and the module that writes each, whose `export` is an
# `exporter.Exporter`. A new format is one file and one line here.
EXPORTERS = {"merged": "droplora_jax.hf.merged", "peft": "droplora_jax.hf.peft.adapter"}
