"""Model families by Hugging Face `model_type`: a new one is one file and one line here."""

from droplora_jax.models import llama, mistral, qwen2, qwen3
from droplora_jax.models.config import ModelConfig, Source
from droplora_jax.models.decoder import Decoder, with_noise
from droplora_jax.models.family import Family, TensorName
from droplora_jax.models.layer import Remat

FAMILIES: dict[str, Family] = {
    "llama": llama.FAMILY,
    "mistral": mistral.FAMILY,
    "qwen2": qwen2.FAMILY,
    "qwen3": qwen3.FAMILY,
}

__all__ = [
    "FAMILIES",
    "Decoder",
    "Family",
    "ModelConfig",
    "Remat",
    "Source",
    "TensorName",
    "with_noise",
]
