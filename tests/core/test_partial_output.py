"""Rows that outlive the process that wrote them, and mix with no others."""

from __future__ import annotations

import pytest

from droplora_jax.core.errors import InputError
from droplora_jax.core.partial_output import Partial

SETTINGS = {"model": "a", "limit": None, "stop": ("x",)}


def test_rows_are_found_again_without_one_that_was_cut_short(tmp_path):
    output = tmp_path / "out.json"
    first = Partial(output, SETTINGS)
    first.write({"id": 1, "text": "one\ntwo ü"})
    first.write({"id": 2})
    with first.file.open("a") as file:
        file.write('{"id": 3, "te')
    second = Partial(output, SETTINGS)
    assert second.rows == first.rows == [{"id": 1, "text": "one\ntwo ü"}, {"id": 2}]
    second.write({"id": 3})
    assert [row["id"] for row in Partial(output, SETTINGS).rows] == [1, 2, 3]
    second.remove()
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize(
    "changes", [{"model": "b"}, {"limit": 3}, {"stop": ()}, {"more": 1}, {"model": None}]
)
def test_other_settings_are_refused_and_named(tmp_path, changes):
    partial = Partial(tmp_path / "out.json", SETTINGS)
    partial.write({"id": 1})
    before = partial.file.read_bytes()
    (key,) = changes
    with pytest.raises(InputError, match=rf"other settings \({key}: "):
        Partial(tmp_path / "out.json", {**SETTINGS, **changes})
    assert partial.file.read_bytes() == before


@pytest.mark.parametrize(
    "content", ["", "mine\n", '"text"\n', "[1]\n", '{"id": 1}\n', '{"settings": 3}\n']
)
def test_a_file_of_something_else_is_kept(tmp_path, content):
    file = tmp_path / "out.json.part"
    file.write_text(content)
    with pytest.raises(InputError, match="not begun by this command"):
        Partial(tmp_path / "out.json", SETTINGS)
    assert file.read_text() == content


def test_without_a_row_there_is_no_file_and_no_setting_is_kept(tmp_path):
    output = tmp_path / "out.json"
    Partial(output, SETTINGS).remove()
    assert list(tmp_path.iterdir()) == []
    other = {**SETTINGS, "model": "b"}
    Partial(output, SETTINGS).file.write_text('{"settings": {"model": "a"}}\n{"id": 1, "te')
    Partial(output, other).write({"id": 1})
    assert Partial(output, other).rows == [{"id": 1}]


def test_a_folder_that_is_missing_is_made(tmp_path):
    Partial(tmp_path / "no" / "out.json", SETTINGS).write({"id": 1})
    assert Partial(tmp_path / "no" / "out.json", SETTINGS).rows == [{"id": 1}]
