"""What PEFT writes of a model's ends although something else says it: looked at, and left out."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path

import jax
import numpy as np

from droplora_jax import hub, processes
from droplora_jax.adapters.base import Adapter
from droplora_jax.errors import InputError
from droplora_jax.export.peft_names import BaseNames, is_copy, split_key
from droplora_jax.models import Decoder
from droplora_jax.weights import TensorFiles, open_folder


def tied_factors(names: BaseNames, tensors: Mapping[str, np.ndarray]) -> dict[str, np.ndarray]:
    """The factors of a tied head, where those of the embedding are among the tensors."""
    return {
        key: np.ascontiguousarray(tensors[original].T)
        for key, original in names.tied_factors.items()
        if original in tensors
    }


def checked_copies(
    model: Decoder, adapters: Mapping[str, Adapter], tensors: TensorFiles, file: Path
) -> set[str]:
    """The tensors that say again what the adapter or the base says.

    Where the head is the embedding, the factors of the head; and of an embedding or a head with an
    adapter, the weight beside it.

    Raises:
      InputError: they say something else.
    """
    names = BaseNames(model.config)
    copies = set()
    for key, original in names.tied_factors.items():
        if key in tensors.files and original in tensors.files:
            copies.add(key)
            if not np.array_equal(tensors.read(key).T, tensors.read(original)):
                raise InputError(
                    f"{file}: {key} is not {original}, transposed: the head was trained apart from "
                    "the embedding, but this base ties them. That can't be represented"
                )
    for key in filter(is_copy, tensors.files):
        path, _ = names.tensors.get(split_key(key)[0], ("", 0))
        if (adapter := adapters.get(path.rpartition(".")[0])) is not None:
            copies.add(key)
            _check_same(key, tensors, _base_value(model, adapter, path), file)
    return copies


def _base_value(model: Decoder, adapter: Adapter, path: str) -> np.ndarray:
    """The base's tensor beside an adapter: the model's, or that of its folder if it has shapes."""
    name, value = BaseNames(model.config).table[path], adapter.base_kernel.get_value()
    if isinstance(value, jax.ShapeDtypeStruct):
        return open_folder(hub.source_folder(model)).read(name.pattern)
    kernel = processes.to_host(value)
    return kernel.T if name.transposed else kernel


def _check_same(key: str, tensors: TensorFiles, base: np.ndarray, file: Path) -> None:
    """Raise InputError unless a tensor is the base's, in the coarser of their dtypes."""
    theirs = tensors.read(key)
    coarser = min(theirs.dtype, base.dtype, key=lambda dtype: dtype.itemsize)
    if theirs.shape != base.shape or (theirs.astype(coarser) != base.astype(coarser)).any():
        raise InputError(
            f"{file}: {key} is not what this base has there: the adapter was made for another "
            "base, or for more tokens. That can't be represented"
        )
