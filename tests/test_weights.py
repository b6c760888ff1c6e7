"""Tensors read slice by slice, and folders that appear whole or not at all."""

from __future__ import annotations

import errno
import json

import ml_dtypes
import numpy as np
import pytest
from safetensors.numpy import save_file

from droplora_jax.errors import InputError
from droplora_jax.weights import (
    atomic_folder,
    check_free,
    open_file,
    open_folder,
    read_json,
    write_json,
)


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
    assert {file.name: sorted(names) for file, names in shards.items()} == {
        "x": ["a", "b"],
        "y": ["c"],
    }


def test_no_safetensors_file(tmp_path):
    with pytest.raises(InputError, match=r"nothing\.safetensors: missing"):
        open_file(tmp_path / "nothing.safetensors")
    (tmp_path / "text.safetensors").write_text("not at all")
    with pytest.raises(InputError, match=r"text\.safetensors: broken"):
        open_file(tmp_path / "text.safetensors")


def test_json_there_and_back(tmp_path):
    value = {"a": [1, 2.5, None, True], "ü": "ß"}
    write_json(tmp_path / "x.json", value)
    assert read_json(tmp_path / "x.json") == value


def test_a_folder_appears_when_complete(tmp_path):
    target = tmp_path / "deep" / "out"
    with atomic_folder(target) as folder:
        (folder / "x").write_text("1")
        assert not target.exists()
    assert (target / "x").read_text() == "1"
    assert [path.name for path in target.parent.iterdir()] == ["out"]
    reference = tmp_path / "reference"
    reference.mkdir()
    assert target.stat().st_mode == reference.stat().st_mode


def test_an_empty_folder_may_be_there(tmp_path):
    (tmp_path / "out").mkdir()
    with atomic_folder(tmp_path / "out") as folder:
        (folder / "x").touch()
    assert (tmp_path / "out" / "x").exists()


@pytest.mark.parametrize("replace", [False, True])
@pytest.mark.parametrize(
    "error", [KeyboardInterrupt(), ValueError("no"), OSError(errno.ENOSPC, "full")]
)
def test_after_an_error_nothing_of_it_remains(tmp_path, error, replace):
    target = tmp_path / "out"
    target.mkdir()
    if replace:
        (target / "old").write_text("old")

    def fail():
        with atomic_folder(target, replace=replace) as folder:
            (folder / "x").write_text("1")
            raise error

    expected = InputError if isinstance(error, OSError) else type(error)
    with pytest.raises(
        expected,
        match=r"out: could not be written \(.*full\)" if isinstance(error, OSError) else None,
    ):
        fail()
    assert [path.name for path in tmp_path.iterdir()] == ["out"]
    assert [path.name for path in target.iterdir()] == (["old"] if replace else [])


def test_replacing(tmp_path):
    target = tmp_path / "out"
    for text in ("1", "2"):
        with atomic_folder(target, replace=True) as folder:
            (folder / text).touch()
    assert [path.name for path in target.iterdir()] == ["2"]
    assert [path.name for path in tmp_path.iterdir()] == ["out"]


def test_what_is_there_is_not_touched(tmp_path):
    (tmp_path / "out").mkdir()
    (tmp_path / "out" / "mine").write_text("mine")
    (tmp_path / "file").write_text("mine")
    for name in ("out", "file"):
        with pytest.raises(InputError, match=rf"{name}: exists.*[Nn]ame another"):
            check_free(tmp_path / name)
        with pytest.raises(InputError, match="exists"), atomic_folder(tmp_path / name):
            pass
    assert (tmp_path / "out" / "mine").read_text() == (tmp_path / "file").read_text() == "mine"


def test_a_parent_that_cannot_be_made_is_an_input_error(tmp_path):
    (tmp_path / "file").write_text("mine")
    with (
        pytest.raises(InputError, match=r"file/out: could not be written"),
        atomic_folder(tmp_path / "file" / "out"),
    ):
        pass
