"""Tensors read slice by slice."""

from __future__ import annotations

import json

import ml_dtypes
import numpy as np
import pytest
from safetensors.numpy import save_file

from droplora_jax.core.errors import InputError
from droplora_jax.hf.tensor_files import open_file, open_folder


@pytest.mark.parametrize("dtype", [np.float32, np.float16, ml_dtypes.bfloat16])
def test_slices(tmp_path, dtype):
    value = np.arange(48).reshape(6, 8).astype(dtype)
    save_file({"a": value, "b": value[0]}, tmp_path / "model.safetensors")
    files = open_folder(tmp_path)
    assert files.shape("a") == (6, 8)
    assert files.dtype("a") == np.dtype(dtype)
    for index in [(), (slice(2, 4),), (slice(None), slice(1, 3)), (slice(0, 6), slice(0, 8))]:
        np.testing.assert_array_equal(files.read("a", index), value[index])
        assert files.read("a", index).dtype == dtype


def test_shards_keep_their_tensors(tmp_path):
    for file, names in {"x": "ab", "y": "c"}.items():
        save_file({name: np.ones(2, np.float32) for name in names}, tmp_path / file)
    index = {"weight_map": {"a": "x", "c": "y", "b": "x"}}
    (tmp_path / "model.safetensors.index.json").write_text(json.dumps(index))
    shards = open_folder(tmp_path).shards()
    assert {file: sorted(names) for file, names in shards.items()} == {
        "x": ["a", "b"],
        "y": ["c"],
    }


def test_no_safetensors_file(tmp_path):
    with pytest.raises(InputError, match=r"nothing\.safetensors: missing"):
        open_file(tmp_path / "nothing.safetensors")
    (tmp_path / "text.safetensors").write_text("not at all")
    with pytest.raises(InputError, match=r"text\.safetensors: broken"):
        open_file(tmp_path / "text.safetensors")
