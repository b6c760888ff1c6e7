"""One safetensors file: against the `safetensors` package, and files that lie."""

from __future__ import annotations

import json
import struct

import ml_dtypes
import numpy as np
import pytest
from safetensors.numpy import load_file, save_file

from droplora_jax.core.errors import InputError
from droplora_jax.hf.safetensors_file import MappedFile, TensorFile, TensorWriter, is_finite

VALUES = {
    "b": np.arange(12, dtype=np.float32).reshape(3, 4),
    "a": np.arange(5).astype(ml_dtypes.bfloat16),
    "none": np.zeros((0, 3), np.float16),
    "half": np.arange(6, dtype=np.float16).reshape(1, 2, 3),
}
ENTRIES = {name: (value.dtype, value.shape) for name, value in VALUES.items()}


def write_all(file, tensors):
    with TensorWriter(file, ENTRIES) as writer:
        for name, tensor in tensors.items():
            writer.write(name, tensor)


def test_what_is_written_is_read_by_the_package_and_back(tmp_path):
    write_all(tmp_path / "ours", VALUES)
    save_file(VALUES, tmp_path / "theirs", metadata={"format": "pt"})
    theirs = load_file(tmp_path / "ours")
    assert theirs.keys() == VALUES.keys()
    for file in ("ours", "theirs"):
        opened = TensorFile(MappedFile(tmp_path / file), file)
        assert opened.entries.keys() == VALUES.keys()
        for name, value in VALUES.items():
            back = opened.rows(name, 0, len(value))
            assert back.dtype == value.dtype
            np.testing.assert_array_equal(back, value)
            np.testing.assert_array_equal(theirs[name], value)
    np.testing.assert_array_equal(opened.rows("b", 1, 3), VALUES["b"][1:3])


def test_a_tensor_is_in_the_file_when_it_is_written(tmp_path):
    """So that one of them is in memory."""
    sizes = []
    with TensorWriter(tmp_path / "out", ENTRIES) as writer:
        for name, value in VALUES.items():
            sizes.append((tmp_path / "out").stat().st_size)
            writer.write(name, value)
    assert [size - sizes[0] for size in sizes] == [0, 48, 58, 58]


def test_another_tensor_than_was_announced(tmp_path):
    with pytest.raises(ValueError, match="half"):
        write_all(tmp_path / "out", {**VALUES, "half": np.zeros((1, 2, 4), np.float16)})
    with pytest.raises(ValueError, match="half was not written"):
        write_all(tmp_path / "out", {name: VALUES[name] for name in ("b", "a", "none")})
    with pytest.raises(ValueError, match="a: bfloat16"):
        write_all(tmp_path / "out", {"a": VALUES["a"]})


@pytest.mark.parametrize("dtype", [np.float32, np.float16, ml_dtypes.bfloat16])
def test_finite(dtype):
    x = np.asarray([0, -0.0, 1e-40, -3, np.finfo(np.float16).max], np.float32).astype(dtype)
    assert is_finite(x)
    for value in (np.nan, np.inf, -np.inf):
        assert not is_finite(np.append(x, np.asarray([value], dtype)))


def write(file, header, content: bytes = bytes(8), length: int | None = None) -> TensorFile:
    text = header if isinstance(header, bytes) else json.dumps(header).encode()
    file.write_bytes(struct.pack("<Q", len(text) if length is None else length) + text + content)
    return TensorFile(MappedFile(file), file)


def tensor(start, stop, dtype="F32", shape=(2,)):
    return {"dtype": dtype, "shape": list(shape), "data_offsets": [start, stop]}


LIES = {
    "longer than the file": ({"x": tensor(0, 8)}, 10**6, "says that its header has 1000000 bytes"),
    "absurdly long": ({"x": tensor(0, 8)}, 2**63, "says that its header has"),
    "shorter": ({"x": tensor(0, 8)}, 5, "not one of safetensors"),
    "no JSON": (b"{{{", None, "not one of safetensors"),
    "a list": ([], None, "not one of safetensors"),
    "beyond the end": ({"x": tensor(0, 16, shape=(4,))}, None, "end at byte"),
    "bytes left over": ({"x": tensor(0, 4, shape=(1,))}, None, "end at byte"),
    "not its shape": ({"x": tensor(0, 8, shape=(3,))}, None, r"not F32 of shape \[3\]"),
    "overlap": ({"x": tensor(0, 8), "y": tensor(4, 8, shape=(1,))}, None, "y begins at byte"),
    "a hole": ({"x": tensor(0, 4, shape=(1,)), "y": tensor(8, 8, shape=(0,))}, None, "y begins"),
    "negative": ({"x": tensor(0, 8, shape=(-2,))}, None, "not one of safetensors"),
    "no offsets": ({"x": {"dtype": "F32", "shape": [2]}}, None, "data_offsets"),
    "twice": (
        b'{"x": %s, "x": %s}' % ((json.dumps(tensor(0, 8)).encode(),) * 2),
        None,
        "'x' is in it twice",
    ),
}


@pytest.mark.parametrize("case", LIES)
def test_a_file_that_lies_is_refused(case, tmp_path):
    header, length, message = LIES[case]
    with pytest.raises(InputError, match=rf"file: broken or cut short \(.*{message}"):
        write(tmp_path / "file", header, length=length)
    assert write(tmp_path / "good", {"x": tensor(0, 8)}).entries["x"].shape == (2,)
