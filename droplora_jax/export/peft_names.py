"""Where a base's layers and parameters are by the names of Hugging Face, and by PEFT's keys."""

from __future__ import annotations

from dataclasses import dataclass
from functools import cached_property

from droplora_jax.models import FAMILIES, ModelConfig, TensorName

PREFIX = "base_model.model."
A, B, MAGNITUDE = ".lora_A.weight", ".lora_B.weight", ".lora_magnitude_vector"
HEAD = "lm_head.weight"
PARTS = {A: "lora_a", B: "lora_b", MAGNITUDE: "magnitude"}  # the adapter's attributes


@dataclass(frozen=True)
class BaseNames:
    """The names of a base of one shape."""

    shape: ModelConfig

    @cached_property
    def table(self) -> dict[str, TensorName]:
        """The stored tensor of every parameter."""
        return FAMILIES[self.shape.family].tensor_names(self.shape)

    def module(self, path: str, layer: int) -> str:
        """The full name of a linear layer's module."""
        return self.table[f"{path}.kernel"].module.format(layer=layer)

    @cached_property
    def modules(self) -> dict[str, tuple[str, int]]:
        """Path and layer of every module that may have an adapter."""
        paths = [p.removesuffix(".kernel") for p in self.table if p.endswith("_proj.kernel")]
        return {self.module(p, i): (p, i) for p in paths for i in range(self.shape.layers)}

    @cached_property
    def tensors(self) -> dict[str, tuple[str, int]]:
        """Path and layer of every stored tensor; a tied head is the embedding."""
        own = {
            name.of_layer(layer): (path, layer)
            for path, name in self.table.items()
            for layer in range(self.shape.layers if name.stacked else 1)
        }
        return own | ({HEAD: ("embed.embedding", 0)} if self.shape.tie_embeddings else {})


def whole_key(tensor: str, adapted: bool) -> str:
    """The key of a tensor that is trained whole, in a module with an adapter or without."""
    module, _, last = tensor.rpartition(".")
    return f"{PREFIX}{module}.base_layer.{last}" if adapted else PREFIX + tensor


def split_key(key: str) -> tuple[str, str | None]:
    """The module and the part of a factor; or the tensor that is trained whole, and None."""
    name = key.removeprefix(PREFIX)
    for part in PARTS:
        if name.endswith(part):
            return name.removesuffix(part), part
    return name.replace(".base_layer.", "."), None
