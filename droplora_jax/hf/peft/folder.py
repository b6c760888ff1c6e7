"""An adapter's folder in PEFT's format: its files, read and checked; one name for each tensor."""

from __future__ import annotations

import re
from collections.abc import Collection, Mapping
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any

from droplora_jax.core.errors import InputError
from droplora_jax.core.files import read_json
from droplora_jax.hf.peft.config import PEFT_FILE, PeftFields, check_fields
from droplora_jax.hf.tensor_files import TensorFiles, open_file
from droplora_jax.nn.options import Quantization

WEIGHTS_FILE = "adapter_model.safetensors"
PICKLED_FILE = "adapter_model.bin"
OWN_FILE = "droplora_config.json"
QUANTIZATION = "quantization"  # a key of it
IGNORED = "ignored_config_keys"  # a key of it
MODEL_FILES = ("model.safetensors", "model.safetensors.index.json")  # of a whole model


@dataclass(frozen=True)
class AdapterFolder:
    """A folder whose two files were read and are right in themselves.

    Attributes:
      fields: of `adapter_config.json`.
      stored: the name in the file of every tensor, by the name that PEFT gives it now.
    """

    path: Path
    fields: PeftFields
    stored: dict[str, str]

    @classmethod
    def read(cls, path: Path) -> AdapterFolder:
        """The files of a folder.

        Raises:
          InputError: a file that is missing or broken, or a field that can't be represented.
        """
        check_adapter(path)
        fields = read_json(path / PEFT_FILE)
        check_fields(fields, path / PEFT_FILE)
        tensors = open_file(_weights(path))
        _check_filled(tensors, path / WEIGHTS_FILE)
        return cls(path, fields, _stored_names(tensors.files))

    @property
    def file(self) -> Path:
        return self.path / WEIGHTS_FILE

    @cached_property
    def tensors(self) -> TensorFiles:
        names = {stored: name for name, stored in self.stored.items()}
        return open_file(self.file).renamed(names)


def adapter_notes(path: Path) -> Mapping[str, Any]:
    """What this project notes beside an adapter; empty for an adapter of another tool."""
    file = path / OWN_FILE
    return read_json(file) if file.exists() else {}


def ignored_config_keys(path: Path) -> tuple[str, ...]:
    """The keys of its base's `config.json` that were ignored when an adapter was trained."""
    return tuple(adapter_notes(path).get(IGNORED, ()))


def check_adapter(path: Path) -> None:
    """Raise InputError unless a folder has an adapter's configuration; says where one is."""
    if (path / PEFT_FILE).exists():
        return
    if not path.exists():
        raise InputError(
            f"{path}: no such folder; of an adapter on the hub take the folder that "
            "huggingface_hub.snapshot_download gives"
        )
    if named := named_adapters(path):
        raise InputError(
            f"{path}: {PEFT_FILE} is not in it, but in {', '.join(map(str, named))}: name that "
            "folder"
        )
    raise InputError(f"{path / PEFT_FILE}: missing")


def named_adapters(path: Path) -> list[Path]:
    """The adapters one folder below, where PEFT puts one with a name and trainers checkpoints."""
    return sorted(file.parent for file in path.glob(f"*/{PEFT_FILE}"))


def holds_model(path: Path) -> bool:
    """Whether a folder has the weights of a whole model."""
    return any((path / name).exists() for name in MODEL_FILES)


def trained_over(path: Path) -> Quantization | None:
    """How the base of an adapter was stored in training, as far as its folder says.

    This project records it; of other tools only the name of the base may tell.
    """
    if notes := adapter_notes(path):
        return quantization_of_record(notes)
    name = str(read_json(path / PEFT_FILE).get("base_model_name_or_path") or "")
    return Quantization("nf4") if re.search(r"bnb[-_]4bit|4bit|nf4", name, re.I) else None


def quantization_of_record(record: Mapping[str, Any]) -> Quantization | None:
    """What `record_of_quantization` has recorded."""
    options = record.get(QUANTIZATION)
    return None if options is None else Quantization(**options)


def record_of_quantization(quantization: Quantization | None) -> dict[str, Any]:
    """What to record beside an adapter; nothing if its base was in full precision."""
    if quantization is None or not quantization.kinds:
        return {}
    return {
        QUANTIZATION: {
            "kind": quantization.kind,
            "tile": quantization.tile,
            "pattern": dict(quantization.pattern),
        }
    }


def _weights(path: Path) -> Path:
    file, pickled = path / WEIGHTS_FILE, path / PICKLED_FILE
    if not file.exists() and pickled.exists():
        raise InputError(
            f"{pickled}: pickled weights, which can run code when loaded, and no {WEIGHTS_FILE} "
            f'beside it. Convert it once: python -c "import torch; from safetensors.torch import '
            f"save_file; save_file({{k: v.contiguous() for k, v in torch.load('{PICKLED_FILE}', "
            f"weights_only=True).items()}}, '{WEIGHTS_FILE}', metadata={{'format': 'pt'}})\""
        )
    return file


def _check_filled(tensors: TensorFiles, file: Path) -> None:
    """Raise InputError for tensors without a value."""
    empty = [name for name in tensors.files if 0 in tensors.shape(name)]
    if tensors.files and not empty:
        return
    which = "it is empty, without any tensor"
    if empty:
        which = f"{len(empty)} of {len(tensors.files)} tensors are empty, such as {empty[0]}"
    raise InputError(
        f"{file}: {which}: a sharded run "
        "(DeepSpeed ZeRO-3, FSDP) saved it from one process, which does not have the values. "
        "Gather them when saving (stage3_gather_16bit_weights_on_model_save, or "
        "zero_to_fp32.py from a checkpoint of the run) and export again"
    )


def _stored_names(keys: Collection[str]) -> dict[str, str]:
    """The tensors that PEFT reads, by their names.

    With `save_embedding_layers`, PEFT stores a module of `modules_to_save` up to three times: as
    `lm_head.weight`, which it reads, as `lm_head.modules_to_save.weight`, and what was there before
    as `lm_head.original_module.weight`, which nothing uses.
    """
    names = {}
    for key in keys:
        name = key.replace(".modules_to_save.", ".")
        if ".original_module." in key or (name != key and name in keys):
            continue
        names[name] = key
    return names
