"""Folders that are no adapter's, or whose tensors can't be read: what is said of them."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import pytest
from safetensors.numpy import save_file

from droplora_jax.core.errors import InputError
from droplora_jax.hf.peft.folder import AdapterFolder, trained_over
from droplora_jax.runs.open_model import base_of

MODULE = "base_model.model.model.layers.0.self_attn.q_proj"
FACTORS = {
    f"{MODULE}.lora_A.weight": np.ones((2, 4), np.float32),
    f"{MODULE}.lora_B.weight": np.ones((4, 2), np.float32),
}


def write(folder: Path, tensors: dict[str, np.ndarray] | None = None, **fields) -> Path:
    folder.mkdir(parents=True, exist_ok=True)
    config = {"peft_type": "LORA", "r": 2, "lora_alpha": 4, "target_modules": ["q_proj"], **fields}
    (folder / "adapter_config.json").write_text(json.dumps(config))
    if tensors is not None:
        save_file(tensors, folder / "adapter_model.safetensors")
    return folder


def test_tensors_that_were_saved_empty(tmp_path):
    """As by one process of a run that is sharded over several."""
    empty = {**FACTORS, "base_model.model.lm_head.weight": np.zeros(0, np.float32)}
    for tensors, count in ((empty, "1 of 3"), ({}, "without any tensor")):
        with pytest.raises(InputError, match=rf"{count}.*ZeRO-3.*Gather"):
            AdapterFolder.read(write(tmp_path, tensors))


def test_pickled_weights_alone(tmp_path):
    (write(tmp_path) / "adapter_model.bin").write_bytes(b"pickle")
    with pytest.raises(
        InputError, match=r"adapter_model\.bin: pickled.*Convert it once.*save_file"
    ):
        AdapterFolder.read(tmp_path)


def test_an_adapter_one_folder_below(tmp_path):
    named = write(tmp_path / "above" / "german", FACTORS)
    with pytest.raises(InputError, match=rf"not in it, but in {named}"):
        AdapterFolder.read(tmp_path / "above")


def test_an_adapter_that_is_not_there_may_be_one_of_the_hub(tmp_path):
    with pytest.raises(InputError, match=r"no such folder.*snapshot_download"):
        AdapterFolder.read(tmp_path / "owner" / "name")


@pytest.mark.parametrize("extra", ["modules_to_save", "original_module"])
def test_what_peft_stores_of_a_trained_module_besides(extra, tmp_path):
    """The tensor has one name here; a copy of what was there before has none."""
    value = np.ones((8, 4), np.float32)
    stored = {**FACTORS, f"base_model.model.lm_head.{extra}.weight": value}
    adapter = AdapterFolder.read(write(tmp_path, stored))
    expected = {"base_model.model.lm_head.weight"} if extra == "modules_to_save" else set()
    assert adapter.tensors.files.keys() == FACTORS.keys() | expected


def test_a_model_beside_its_own_adapter_is_no_base(tmp_path):
    write(tmp_path, FACTORS, base_model_name_or_path=str(tmp_path))
    with pytest.raises(InputError, match="names itself as its base.*count twice"):
        base_of(tmp_path)


def test_how_the_base_was_stored_in_training(tmp_path):
    assert trained_over(write(tmp_path, base_model_name_or_path="owner/llama")) is None
    write(tmp_path, base_model_name_or_path="owner/llama-bnb-4bit")
    assert trained_over(tmp_path).kinds == ["nf4"]
    recorded = {"kind": "int8", "tile": 32, "pattern": {"down_proj": "nf4"}}
    (tmp_path / "droplora_config.json").write_text(json.dumps({"quantization": recorded}))
    assert trained_over(tmp_path).kinds == ["int8", "nf4"]
