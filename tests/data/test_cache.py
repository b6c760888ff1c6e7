"""Rows on disk: made once for all that they depend on, whole or not at all."""

from __future__ import annotations

import os
import shutil
import subprocess
import sys
import threading
from dataclasses import replace

import numpy as np
import pytest
from data_fixtures import assert_rows_equal, make_tokenizer, write_jsonl

from droplora_jax.core.errors import InputError
from droplora_jax.data import cache
from droplora_jax.data.config import DataConfig
from droplora_jax.data.load import _write, load

DATA = [{"prompt": f"{i} the", "completion": "true" * (i % 7)} for i in range(50)]


@pytest.fixture
def config(tmp_path):
    path = write_jsonl(tmp_path / "a.jsonl", DATA)
    return DataConfig(train=path, max_length=14, cache=str(tmp_path / "cache"))


@pytest.fixture
def made(monkeypatch) -> list[str]:
    """The names of the files whose rows are made."""
    names = []
    write = _write

    def counted(file, *arguments, **options):
        names.append(file.name)
        write(file, *arguments, **options)

    monkeypatch.setattr("droplora_jax.data.load._write", counted)
    return names


def loaded_of(config, **changes):
    return load(config.train, make_tokenizer(), replace(config, **changes))


def test_rows_are_made_once_and_lie_on_disk(config, made):
    rows, report = loaded_of(config)
    again, same = loaded_of(config)
    assert made == [config.train]
    assert report == same
    assert report.cut > 0
    assert report.dropped_empty > 0
    assert_rows_equal(rows, again)
    assert isinstance(again[0].ids.base, np.memmap)
    with pytest.raises(ValueError, match="read-only"):
        again[0].ids[0] = 1


def test_a_file_that_has_moved_is_known_and_reported_by_its_new_name(config, made, tmp_path):
    _, report = loaded_of(config)
    moved = str(tmp_path / "other.jsonl")
    shutil.move(config.train, moved)
    _, after = loaded_of(replace(config, train=moved))
    assert len(made) == 1
    assert after.sources[0].path == moved
    assert [place.replace("a.jsonl", "other.jsonl") for place in report.empty] == list(after.empty)


@pytest.mark.parametrize(
    "changes",
    [
        {"max_length": 13},
        {"too_long": "drop"},
        {"format": "prompt_completion"},
        {"train_on": "all"},
        {"columns": {"prompt": "completion"}},
    ],
)
def test_other_settings_make_other_rows(config, made, changes):
    loaded_of(config)
    loaded_of(config, **changes)
    assert len(made) == 2


def test_another_file_tokenizer_or_code_makes_other_rows(config, made, monkeypatch, tmp_path):
    loaded_of(config)
    load(config.train, make_tokenizer(adds_bos=False), config)
    load(config.train, make_tokenizer(chat_template="x"), config)
    write_jsonl(tmp_path / "a.jsonl", DATA[:-1])
    rows, _ = loaded_of(config)
    assert len(made) == 4
    assert len(rows) < 50
    monkeypatch.setattr(cache, "_code", lambda: "new")
    loaded_of(config)
    assert len(made) == 5


def test_what_changes_no_row_makes_none(config, made):
    loaded_of(config)
    loaded_of(config, packing="best_fit", valid_fraction=0.5)
    assert len(made) == 1


def entries(config):
    return sorted(os.listdir(config.cache))


@pytest.mark.parametrize("name", ["ids", "trained", "ends", "keys", "info.json"])
def test_what_is_not_whole_is_made_again(config, made, name):
    rows, report = loaded_of(config)
    rows = [replace(row, ids=row.ids.copy(), trained=row.trained.copy()) for row in rows]
    (folder,) = [path for path in entries(config) if not path.startswith(".")]
    file = os.path.join(config.cache, folder, name)
    with open(file, "rb+") as opened:
        opened.truncate(os.path.getsize(file) - 1)
    left = os.path.join(config.cache, f".{folder}.left")  # of a process that was killed
    os.mkdir(left)
    again, same = loaded_of(config)
    assert len(made) == 2
    assert report == same
    assert_rows_equal(rows, again)
    assert not os.path.exists(left)


def test_an_error_leaves_nothing(config, tmp_path):
    bad = write_jsonl(tmp_path / "a.jsonl", [*DATA, {"prompt": 1}])
    with pytest.raises(InputError, match=r"a\.jsonl:51: "):
        load(bad, make_tokenizer(), config)
    assert all(name.endswith(".lock") for name in entries(config))


def test_a_file_that_changes_while_it_is_read(config, monkeypatch, tmp_path):
    write = _write

    def changing(file, *arguments, **options):
        write(file, *arguments, **options)
        write_jsonl(tmp_path / "a.jsonl", DATA[1:])

    monkeypatch.setattr("droplora_jax.data.load._write", changing)
    with pytest.raises(InputError, match=r"a\.jsonl: was changed while it was read"):
        loaded_of(config)
    assert all(name.endswith(".lock") for name in entries(config))


def test_threads_that_race_make_the_rows_once(config, made):
    results = [None] * 4

    def work(i):
        results[i] = loaded_of(config)[0]

    threads = [threading.Thread(target=work, args=[i]) for i in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert len(made) == 1
    for rows in results:
        assert_rows_equal(rows, results[0])


def test_a_folder_that_can_not_be_written(config, tmp_path):
    (tmp_path / "file").write_text("mine")
    with pytest.raises(InputError, match="set data.cache to a folder elsewhere"):
        loaded_of(config, cache=str(tmp_path / "file"))


def test_a_full_disk(tmp_path):
    room = tmp_path / "room"
    room.mkdir()
    mount = ["mount", "-t", "tmpfs", "-o", "size=64k", "tmpfs", str(room)]
    if os.geteuid() != 0 or subprocess.run(mount, capture_output=True).returncode:
        pytest.skip("mounting a small file system needs root")
    try:
        path = write_jsonl(tmp_path / "a.jsonl", [{"text": "0 1 2 3 4 5 6 7 8 9 " * 20}] * 2000)
        with pytest.raises(InputError, match=r"No space left on device.*set data\.cache"):
            load(path, make_tokenizer(), DataConfig(train=path, cache=str(room)))
        assert all(name.endswith(".lock") for name in os.listdir(room))
    finally:
        subprocess.run(["umount", "-l", str(room)], check=True)


def test_no_row_of_a_file_is_no_error_where_another_has_one(config, tmp_path):
    empty = write_jsonl(tmp_path / "b.jsonl", [{"prompt": "a", "completion": ""}])
    rows, report = load((empty, config.train), make_tokenizer(), config)
    assert rows.counts[0] == 0
    assert len(rows) == rows.counts[1] > 0
    assert report.read == 51
    np.testing.assert_array_equal(rows[0].ids, loaded_of(config)[0][0].ids)


MEMORY = """
import sys
from droplora_jax.data.config import DataConfig
from droplora_jax.data.load import load
rows, _ = load(sys.argv[1], make_tokenizer(), DataConfig(train=sys.argv[1], cache=sys.argv[2]))
peak = [line for line in open("/proc/self/status") if line.startswith("VmHWM")][0].split()[1]
print(len(rows.lengths), rows.lengths.sum(), peak)
"""


@pytest.mark.slow
def test_memory_stays_flat_however_large_the_file(tmp_path):
    """Resident at its most, of a process of its own: 12 MB more for 100 MB more."""
    row = {"text": "the answer is true: " + "0123456789 " * 90}
    peaks = []
    for count in (50_000, 150_000):
        path = write_jsonl(tmp_path / f"{count}.jsonl", [row] * count)
        command = [sys.executable, "-c", MEMORY, path, str(tmp_path / "cache")]
        environment = os.environ | {"PYTHONPATH": os.pathsep.join(sys.path)}
        out = subprocess.run(command, env=environment, capture_output=True, text=True, check=True)
        peaks.append(int(out.stdout.split()[-1]))
    assert peaks[1] - peaks[0] < 12_000
