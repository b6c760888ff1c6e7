"""Where in a PEFT folder the arrays of a model with adapters are."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from droplora_jax.adapters.base import Adapter, base_path
from droplora_jax.adapters.low_rank_layer import LowRankLinear
from droplora_jax.adapters.surgery import adapters_of
from droplora_jax.core import distributed
from droplora_jax.core.errors import InputError
from droplora_jax.hf.peft.ends import frozen_copies
from droplora_jax.hf.peft.folder import AdapterFolder
from droplora_jax.hf.peft.names import (
    EMBEDDING,
    HEAD,
    LINEAR,
    MAGNITUDE,
    PREFIX,
    BaseNames,
    is_copy,
    split_key,
    whole_key,
)
from droplora_jax.hf.tensor_files import TensorFiles, open_source
from droplora_jax.models.decoder import Decoder
from droplora_jax.nn.layer_paths import Path as ModulePath

Places = dict[str, tuple[int | None, tuple[slice | np.ndarray, ...]]]


@dataclass(frozen=True)
class Slot:
    """The tensors that an array of the model is stored in.

    Attributes:
      places: tensor name -> (index of the layer in the stack, or None without a stack; slice of
        that layer).
      transposed: the stored tensor is the slice transposed.
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


def slot_of_whole(where: ModulePath, model: Decoder) -> Slot:
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


def tied_factors(names: BaseNames, tensors: Mapping[str, np.ndarray]) -> dict[str, np.ndarray]:
    """The factors of a tied head, where those of the embedding are among the tensors."""
    return {
        key: np.ascontiguousarray(tensors[original].T)
        for key, original in names.tied_factors.items()
        if original in tensors
    }


def checked_copies(
    model: Decoder, adapters: Mapping[str, Adapter], adapter: AdapterFolder
) -> set[str]:
    """The names of the redundant tensors, checked to equal their originals.

    They are the head's factors where the head is tied to the embedding, the base weight of a module
    with an adapter, and ends that were not trained. (`ends.under` has made the base's ends those of
    the adapter.)

    Raises:
      InputError: a tensor differs from its original.
    """
    names, tensors = BaseNames(model.config), adapter.tensors
    copies = set()
    for key, original in names.tied_factors.items():
        if key in tensors.files and original in tensors.files:
            copies.add(key)
            if not np.array_equal(tensors.read(key).T, tensors.read(original)):
                raise InputError(
                    f"{adapter.file}: {key} is not {original}, transposed: the head was trained "
                    "apart from the embedding, but ensure_weight_tying is on. That can't be "
                    "represented"
                )
    frozen = frozen_copies(model.config, adapter)
    for key in tensors.files:
        path, _ = names.tensors.get(split_key(key)[0], ("", 0))
        if key in frozen or (is_copy(key) and path.rpartition(".")[0] in adapters):
            copies.add(key)
            _check_same(key, tensors, _base_value(model, split_key(key)[0], path), adapter.file)
    return copies


def _base_value(model: Decoder, tensor: str, path: str) -> np.ndarray:
    """A tensor of the base: as its source has it, or of the model if it comes from no folder."""
    name = BaseNames(model.config).table[path]
    if model.source is not None:
        base = open_source(model.source)
        return base.read(tensor if tensor in base.files else name.pattern)
    owner, _, attribute = path.rpartition(".")
    layer = adapters_of(model).get(owner)
    value = getattr(getattr(model, owner), attribute) if layer is None else layer.base_kernel
    kernel = distributed.to_host(value.get_value())
    return kernel.T if name.transposed else kernel


def _check_same(key: str, tensors: TensorFiles, base: np.ndarray, file: Path) -> None:
    """Raise InputError unless a tensor is the base's, in the coarser of their dtypes."""
    theirs = tensors.read(key)
    coarser = min(theirs.dtype, base.dtype, key=lambda dtype: dtype.itemsize)
    if theirs.shape != base.shape or (theirs.astype(coarser) != base.astype(coarser)).any():
        raise InputError(
            f"{file}: {key} is not what this base has there: the adapter was made for another "
            "base. That can't be represented"
        )
