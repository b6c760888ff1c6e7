"""Model families by Hugging Face `model_type`: a new one is one file and one line here."""

from droplora_jax.models.families import llama, mistral, qwen2, qwen3
from droplora_jax.models.families.base import Family

FAMILIES: dict[str, Family] = {
    "llama": llama.FAMILY,
    "mistral": mistral.FAMILY,
    "qwen2": qwen2.FAMILY,
    "qwen3": qwen3.FAMILY,
}
