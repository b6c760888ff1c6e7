"""JSON, and files and folders that appear whole or not at all."""

from __future__ import annotations

import errno

import pytest

from droplora_jax.core.errors import InputError
from droplora_jax.core.files import (
    atomic_folder,
    check_free,
    new_file,
    read_json,
    temporary_files,
    write_file,
    write_json,
)


@pytest.mark.parametrize("content", ["text ü", b"bytes"])
def test_a_file_is_replaced_whole(tmp_path, content, monkeypatch):
    file = tmp_path / "x"
    file.write_text("old")
    with monkeypatch.context() as patch:

        def full(number: int) -> None:
            raise OSError(errno.ENOSPC, "full")

        patch.setattr("os.fsync", full)
        with pytest.raises(OSError, match="full"):
            write_file(file, content)
    assert file.read_text() == "old"
    assert [path.name for path in tmp_path.iterdir()] == ["x"]
    write_file(file, content)
    assert file.read_bytes() == (content.encode() if isinstance(content, str) else content)
    assert [path.name for path in tmp_path.iterdir()] == ["x"]


def test_what_a_killed_write_left_can_be_ignored(tmp_path):
    file = tmp_path / "config.yaml"
    with new_file(file):
        (left,) = temporary_files(file)
    file.unlink()
    left.touch()
    check_free(tmp_path, ignore=temporary_files(file))
    with pytest.raises(InputError, match="not empty"):
        check_free(tmp_path)


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
