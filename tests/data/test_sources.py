"""Where data is: files, folders, globs, buckets, the hub; and what is said where there is none."""

from __future__ import annotations

import json
import sys
from pathlib import Path

import datasets
import fsspec
import pytest
from data_fixtures import make_tokenizer, write_jsonl

from droplora_jax.core import remote
from droplora_jax.core.errors import InputError
from droplora_jax.data.config import DataConfig
from droplora_jax.data.load import load
from droplora_jax.data.sources import HubSet, files_of


def names(place) -> list[str]:
    return [file.name for file in files_of(str(place))]


def rows(place) -> list[dict]:
    return [row for file in files_of(str(place)) for _, row in file.records()]


@pytest.fixture
def folder(tmp_path) -> Path:
    folder = tmp_path / "data"
    (folder / "more").mkdir(parents=True)
    for name in ("b.jsonl", "a.jsonl.gz", "more/c.jsonl"):
        write_jsonl(folder / name, [{"text": name}])
    (folder / "README.md").write_text("what this is")
    (folder / ".hidden.jsonl").write_text("")
    return folder


def test_a_file_a_folder_and_a_glob(folder):
    assert names(folder / "b.jsonl") == [str(folder / "b.jsonl")]
    both = [str(folder / "a.jsonl.gz"), str(folder / "b.jsonl")]
    assert names(folder) == names(f"{folder}/") == both
    assert names(folder / "*.jsonl*") == both
    assert names(folder / "**" / "*.jsonl") == [both[1], str(folder / "more" / "c.jsonl")]


def test_a_name_with_a_star_is_a_name_if_there_is_such_a_file(folder):
    write_jsonl(folder / "[x]*.jsonl", [{"text": "a"}])
    assert names(folder / "[x]*.jsonl") == [str(folder / "[x]*.jsonl")]


def test_places_that_hold_nothing(folder, tmp_path):
    with pytest.raises(InputError, match=r"\*\.csv: matches no file"):
        files_of(str(folder / "*.csv"))
    (tmp_path / "empty").mkdir()
    with pytest.raises(InputError, match=r"empty: the folder holds no data file \(\.jsonl, "):
        files_of(str(tmp_path / "empty"))
    write_jsonl(folder / "d.csv", [])
    with pytest.raises(InputError, match=r"holds \.csv and \.jsonl files; say which: .*/\*\.csv"):
        files_of(str(folder))


def test_what_the_datasets_library_saves(tmp_path):
    data = [{"prompt": str(i), "completion": "é"} for i in range(30)]
    table = datasets.Dataset.from_list(data)
    table.save_to_disk(tmp_path / "saved", num_shards=3)
    assert rows(tmp_path / "saved") == data
    assert rows(tmp_path / "saved" / "*.arrow") == data
    splits = datasets.DatasetDict({"train": table, "test": table.select(range(2))})
    splits.save_to_disk(tmp_path / "splits")
    assert rows(tmp_path / "splits" / "test") == data[:2]
    with pytest.raises(
        InputError, match=r"holds the splits train, test; name one: .*/splits/train"
    ):
        files_of(str(tmp_path / "splits"))
    table.to_parquet(tmp_path / "a.parquet")
    assert rows(tmp_path / "a.parquet") == data


# --- a bucket -------------------------------------------------------------------------------------


@pytest.fixture
def bucket(tmp_path, monkeypatch):
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    fs = fsspec.filesystem("memory")
    for name in ("b.jsonl", "a.jsonl"):
        fs.pipe(f"/bucket/data/{name}", json.dumps({"text": name}).encode())
    fs.pipe("/bucket/data/README.md", b"x")
    yield fs
    fs.rm("/bucket", recursive=True)


def test_a_bucket(bucket):
    texts = [{"text": "a.jsonl"}, {"text": "b.jsonl"}]
    assert rows("memory://bucket/data") == rows("memory://bucket/data/*.jsonl") == texts
    assert rows("memory://bucket/data/b.jsonl") == texts[1:]
    assert names("memory://bucket/data/b.jsonl") == ["memory://bucket/data/b.jsonl"]
    config = DataConfig(train="memory://bucket/data")
    loaded, report = load(config.train, make_tokenizer(), config)
    assert len(loaded) == 2
    assert report.sources[0].path == "memory://bucket/data/a.jsonl"


def test_a_file_is_fetched_once_and_again_when_it_has_changed(bucket, monkeypatch):
    opened = []
    open_file = type(bucket).open

    def counted(self, path, *arguments, **options):
        opened.append(path)
        return open_file(self, path, *arguments, **options)

    monkeypatch.setattr(type(bucket), "open", counted)
    assert rows("memory://bucket/data/a.jsonl") == rows("memory://bucket/data/a.jsonl")
    assert len(opened) == 1
    bucket.pipe("/bucket/data/a.jsonl", b'{"text": "new"}')
    opened.clear()
    assert rows("memory://bucket/data/a.jsonl") == [{"text": "new"}]
    assert len(opened) == 1


def test_a_bucket_without_the_file(bucket):
    with pytest.raises(InputError, match=r"memory://bucket/no\.jsonl: no such file on the bucket"):
        files_of("memory://bucket/no.jsonl")
    with pytest.raises(InputError, match=r"memory://bucket/\*\.csv: matches no file"):
        files_of("memory://bucket/*.csv")
    with pytest.raises(InputError, match="nosuch://a/b.jsonl: .*nosuch"):
        files_of("nosuch://a/b.jsonl")


class Locked(fsspec.AbstractFileSystem):
    """As a bucket answers who has not signed in."""

    protocol = "s3"

    def ls(self, path, detail=True, **options):
        raise PermissionError("Unable to locate credentials")

    info = isdir = isfile = exists = ls


@pytest.mark.parametrize("place", ["s3://b/a.jsonl", "s3://b/*.jsonl", "s3://b/data/"])
def test_a_bucket_without_credentials(monkeypatch, place):
    monkeypatch.setattr(remote, "_filesystem", lambda url: (Locked(), url))
    with pytest.raises(InputError) as error:
        files_of(place)
    assert str(error.value) == (
        f"{place}: can't be read (PermissionError: Unable to locate credentials). If you have "
        "access, sign in: aws configure"
    )


def test_a_bucket_whose_package_is_missing(monkeypatch):
    def missing(url):
        raise ImportError("Install s3fs to access S3")

    monkeypatch.setattr(fsspec.core, "url_to_fs", missing)
    with pytest.raises(InputError, match="s3://b/a.jsonl: needs s3fs: pip install s3fs"):
        files_of("s3://b/a.jsonl")


# --- the hub --------------------------------------------------------------------------------------


def test_how_a_data_set_of_the_hub_is_named():
    assert HubSet.read("hf://openai/gsm8k?config=main&split=test&revision=abc") == HubSet(
        "openai/gsm8k", "main", "test", "abc"
    )
    assert HubSet.read("hf://squad") == HubSet("squad")
    with pytest.raises(InputError, match="unknown option spilt; there are config, split, revision"):
        HubSet.read("hf://a/b?spilt=test")
    with pytest.raises(InputError, match=r"split=train\[:9\]: must be the name of one split"):
        HubSet.read("hf://a/b?split=train[:9]")


def test_a_data_set_of_the_hub(tmp_path, monkeypatch):
    """The library's own loading, of a folder instead of an id."""
    data = [{"question": str(i), "answer": "é"} for i in range(30)]
    (tmp_path / "set").mkdir()
    write_jsonl(tmp_path / "set" / "test.jsonl", data)
    original, asked = datasets.load_dataset, []

    def load_dataset(name, config, *, split, revision):
        asked.append((name, config, split, revision))
        return original(str(tmp_path / "set"), split=split, cache_dir=str(tmp_path / "cache"))

    monkeypatch.setattr(datasets, "load_dataset", load_dataset)
    url = "hf://openai/gsm8k?config=main&split=test"
    assert rows(url) == data
    assert asked == [("openai/gsm8k", "main", "test", None)]
    assert names(url)[0].startswith(f"{url} (")


def test_the_hub_without_a_network_or_the_library(monkeypatch):
    url = "hf://openai/gsm8k?config=main"
    with pytest.raises(InputError, match="could not be fetched from the hub .*Without a network"):
        files_of(url)  # as the tests have none
    monkeypatch.setitem(sys.modules, "datasets", None)
    with pytest.raises(InputError, match=r"needs the datasets library: pip install 'droplora-jax"):
        files_of(url)


def test_a_path_of_the_hub_is_a_url_as_any_other(monkeypatch):
    monkeypatch.setattr(remote, "names_in", lambda url: None)
    monkeypatch.setattr(remote, "fetch_file", lambda url: Path("/fetched.jsonl"))
    assert names("hf://datasets/openai/gsm8k/a.jsonl") == ["hf://datasets/openai/gsm8k/a.jsonl"]
