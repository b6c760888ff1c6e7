"""Where in a PEFT folder the arrays of a model with adapters are."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from droplora_jax.adapters.base import base_path
from droplora_jax.adapters.branch import LowRankLinear
from droplora_jax.errors import InputError
from droplora_jax.export.peft_names import (
    EMBEDDING,
    HEAD,
    LINEAR,
    MAGNITUDE,
    PREFIX,
    BaseNames,
    whole_key,
)
from droplora_jax.models import Decoder
from droplora_jax.surgery import adapters_of
from droplora_jax.weights import TensorFiles

Places = dict[str, tuple[int | None, tuple[Any, ...]]]


@dataclass(frozen=True)
class Slot:
    """The tensors that an array of the model is stored in.

    Attributes:
      places: each tensor's name, with the layer of the stack (None without a stack), and what of
        that layer it is.
      transposed: a tensor is the transpose of its place.
    """

    places: Places
    transposed: bool

    def stored(self, value: np.ndarray) -> dict[str, np.ndarray]:
        """The tensors of an array."""
        tensors = {}
        for key, (layer, index) in self.places.items():
            own = (value if layer is None else value[layer])[index]
            tensors[key] = np.ascontiguousarray(own.T if self.transposed else own)
        return tensors

    def filled(self, shape: tuple[int, ...], tensors: TensorFiles, file: Path) -> np.ndarray:
        """The array of the tensors; zero where there is none."""
        out = np.zeros(shape, np.float32)
        for key, (layer, index) in self.places.items():
            place = out if layer is None else out[layer]
            own = place[index].shape[:: -1 if self.transposed else 1]
            if key not in tensors.files:
                raise InputError(f"{file}: lacks {key}")
            if tensors.shape(key) != own:
                raise InputError(
                    f"{file}: {key} has shape {list(tensors.shape(key))}, the "
                    f"model needs {list(own)}: the adapter was made for another base or rank"
                )
            place[index] = tensors.read(key, dtype=np.float32, transposed=self.transposed)
        return out


def slots_of(path: str, adapter: LowRankLinear, names: BaseNames) -> dict[str, Slot]:
    """Where the arrays that an adapter stores are, by its own names for them."""
    slots = {}
    stacked = bool(adapter.spec.stack(adapter.base_kernel.get_value()))
    for part, attribute in (EMBEDDING if adapter.spec.lookup else LINEAR).items():
        places: Places = {}
        for layer, there in enumerate(adapter.adapted):
            ranks = adapter.ranks_of(layer)
            index = {"lora_a": (slice(None), ranks), "lora_b": (ranks,)}.get(attribute, ())
            if there:
                key = f"{PREFIX}{names.module(path, layer)}{part}"
                places[key] = (layer if stacked else None, index)
        slots[attribute] = Slot(places, transposed=part != MAGNITUDE)
    return slots


def slot_of_whole(where: tuple[Any, ...], model: Decoder) -> Slot:
    """Where a parameter that is trained whole is."""
    path = base_path(where)
    name = BaseNames(model.config).table[path]
    owner: Any = adapters_of(model).get(path.rpartition(".")[0])
    places: Places = {}
    for layer in range(model.config.layers if name.stacked else 1):
        adapted = owner is not None and owner.adapted[layer]
        places[whole_key(name.of_layer(layer), adapted)] = (layer if name.stacked else None, ())
    if model.config.tie_embeddings and path == "embed.embedding":
        places[whole_key(HEAD, False)] = (None, ())
    return Slot(places, name.transposed)
