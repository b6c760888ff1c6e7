"""Where a base's layers and parameters are by the names of Hugging Face, and by PEFT's keys."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from functools import cached_property
from typing import Any

from droplora_jax.adapters.interop.stored_factors import LINEAR, MAGNITUDE, A, B
from droplora_jax.models.config import ModelConfig
from droplora_jax.models.families import FAMILIES
from droplora_jax.models.parameter_table import TensorName

PREFIX = "base_model.model."
EMBEDDING_A, EMBEDDING_B = ".lora_embedding_A", ".lora_embedding_B"
EMBED = "embed"  # the path of the embedding
HEAD = "lm_head.weight"
# What an adapter of the embedding stores, and its attributes; `LINEAR` is that of a linear layer.
EMBEDDING = {EMBEDDING_A: "lora_a", EMBEDDING_B: "lora_b", MAGNITUDE: "magnitude"}
PARTS = LINEAR | EMBEDDING


@dataclass(frozen=True)
class BaseNames:
    """The names of a base of one shape."""

    shape: ModelConfig

    @cached_property
    def table(self) -> dict[str, TensorName]:
        """The stored tensor of every parameter."""
        return FAMILIES[self.shape.family].tensor_names(self.shape)

    def module(self, path: str, layer: int) -> str:
        """The full name of the module of a linear layer or of the embedding."""
        kernel = "embedding" if path == EMBED else "kernel"
        return self.table[f"{path}.{kernel}"].module.format(layer=layer)

    @cached_property
    def modules(self) -> dict[str, tuple[str, int]]:
        """Path and layer of every module that may have an adapter."""
        return {
            name.module.format(layer=layer): (path.rpartition(".")[0], layer)
            for path, name in self.table.items()
            if path.endswith((".kernel", ".embedding"))
            for layer in range(self.shape.layers if name.stacked else 1)
        }

    @cached_property
    def tied_factors(self) -> dict[str, str]:
        """The factors of a tied head, which are those of the embedding, each one transposed."""
        if not self.shape.tie_embeddings:
            return {}
        head, embedding = (
            PREFIX + name for name in (HEAD.rpartition(".")[0], self.module(EMBED, 0))
        )
        return {head + A: embedding + EMBEDDING_B, head + B: embedding + EMBEDDING_A}

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


def saved_module(peft: Mapping[str, Any], module: str) -> bool:
    """Whether a module is one of PEFT's `modules_to_save`: trained as it is, without factors."""
    return any(module.endswith(name) for name in peft.get("modules_to_save") or ())


def is_copy(key: str) -> bool:
    """Whether a key is a copy of a base weight: PEFT saves one for adapted embeddings and heads."""
    return key.endswith(".base_layer.weight")
