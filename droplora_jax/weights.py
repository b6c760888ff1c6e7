"""Safetensors files as one table of tensors, read slice by slice."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

import ml_dtypes
import numpy as np
from safetensors import SafetensorError, safe_open

from droplora_jax.errors import InputError
from droplora_jax.files import read_json

INDEX_FILE = "model.safetensors.index.json"
SINGLE_FILE = "model.safetensors"
DTYPES = {"F32": np.float32, "F16": np.float16, "BF16": ml_dtypes.bfloat16}


def open_folder(folder: Path) -> TensorFiles:
    """The tensors of `model.safetensors`, or of the shards that its index lists.

    Raises:
      InputError: no safetensors (pickled weights are not read), or a broken index.
    """
    index, single = folder / INDEX_FILE, folder / SINGLE_FILE
    if index.exists():
        weight_map = read_json(index).get("weight_map")
        if not isinstance(weight_map, dict):
            raise InputError(f"{index}: no 'weight_map' in it; download the index again")
        return TensorFiles({name: folder / file for name, file in weight_map.items()})
    if single.exists():
        return open_file(single)
    if pickled := sorted(path.name for path in folder.glob("*.bin")):
        raise InputError(
            f"{folder}: only pickled weights ({', '.join(pickled[:3])}), which can run code when "
            "loaded. Convert them once with transformers: "
            "AutoModelForCausalLM.from_pretrained(DIR).save_pretrained(NEW_DIR)"
        )
    raise InputError(f"{folder}: neither {SINGLE_FILE} nor {INDEX_FILE} in it")


def open_file(file: Path) -> TensorFiles:
    """The tensors of one safetensors file."""
    return TensorFiles({name: file for name in _open(file).keys()})  # noqa: SIM118


def _open(file: Path) -> Any:
    if not file.exists():
        raise InputError(f"{file}: missing; download it again")
    try:
        return safe_open(file, framework="numpy")
    except (SafetensorError, OSError) as error:
        raise InputError(f"{file}: broken or cut short ({error}); download it again") from error


class TensorFiles:
    """Tensors by name, each in a file of its own or with others, read slice by slice."""

    def __init__(self, files: Mapping[str, Path]) -> None:
        self.files = dict(files)
        self._handles: dict[Path, Any] = {}

    def shards(self) -> dict[Path, list[str]]:
        """The files, each with its tensors' names."""
        shards: dict[Path, list[str]] = {}
        for name, file in self.files.items():
            shards.setdefault(file, []).append(name)
        return shards

    def shape(self, name: str) -> tuple[int, ...]:
        return tuple(self._slice(name).get_shape())

    def dtype(self, name: str) -> np.dtype:
        stored = self._slice(name).get_dtype()
        if stored not in DTYPES:
            raise InputError(
                f"{self.files[name]}: {name} is stored as {stored}; supported: {', '.join(DTYPES)}"
            )
        return np.dtype(DTYPES[stored])

    def read(self, name: str, index: tuple[slice, ...] = ()) -> np.ndarray:
        """One slice of a tensor; nothing else is read."""
        self.dtype(name)
        return self._slice(name)[index or slice(None)]

    def _slice(self, name: str) -> Any:
        file = self.files[name]
        if file not in self._handles:
            self._handles[file] = _open(file)
        try:
            return self._handles[file].get_slice(name)
        except SafetensorError as error:
            raise InputError(
                f"{file}: does not hold {name} ({error}); download it again"
            ) from error
