"""Data files: their records and places, and what a person is told about a broken one."""

from __future__ import annotations

import gzip
import json

import pytest
from data_fixtures import fails

from droplora_jax.data.data_file import local


def read(path):
    return list(local(path).records())


@pytest.mark.parametrize("packed", [False, True])
@pytest.mark.parametrize("mark", [b"", b"\xef\xbb\xbf"])
def test_json_and_json_lines_say_where_a_row_stands(tmp_path, packed, mark):
    rows = [{"text": "één"}, {"text": "a\u2028b"}]
    texts = {"a.json": json.dumps(rows, ensure_ascii=False, indent=1)}
    texts["a.jsonl"] = "\n\n".join(json.dumps(row, ensure_ascii=False) for row in rows) + "\r\n"
    where = {"a.json": ["{}, row 1", "{}, row 2"], "a.jsonl": ["{}:1", "{}:3"]}
    for name, text in texts.items():
        raw = mark + text.encode()
        path = tmp_path / (name + ".gz" if packed else name)
        path.write_bytes(gzip.compress(raw, mtime=0) if packed else raw)
        assert read(path) == [
            (place.format(path), row) for place, row in zip(where[name], rows, strict=True)
        ]


@pytest.mark.parametrize(
    ("name", "raw", "message"),
    [
        ("a.jsonl", b'{"text": "a"}\n{"text": ', r"a\.jsonl:2: broken JSON"),
        ("a.jsonl", b'[\n{"text": "a"}\n{"text": "b"}]', r"a\.jsonl:3: broken JSON"),
        ("a.jsonl", b'{"text": "a"}\n3\n', r"a\.jsonl:2: must be an object with keys, is 3"),
        ("a.json", b'[{"text": "a"},\n{"text" "b"}]', r"a\.json:2: broken JSON"),
        ("a.json", b'{"text": "a"}\n{"text" "b"}', r"a\.json:2: broken JSON"),
        ("a.json", b'{"text": "a"}\n3', r"a\.json:2: must be an object with keys, is 3"),
        ("a.json", b"3", "must be a list of objects, is 3"),
        ("a.json", b'{"data": []}', "the file is empty"),
        (
            "a.json",
            b'{"train": [{"text": "a"}], "test": [{"text": "b"}]}',
            r"holds several lists of rows \(train, test\)",
        ),
        ("a.json", b'[{"text": "a"}, null]', "row 2: must be an object with keys, is null"),
        ("a.json", b"[]", "the list is empty"),
        ("a.json", b"[" * 100_000, "broken JSON"),
        ("a.json", b"", "the file is empty"),
        ("a.jsonl", b" \n\n", "the file is empty"),
        ("a.jsonl", b'{"text": "a"}\n{"text": "\xe9"}', r"a\.jsonl:2: not UTF-8 \(byte 0xe9\)"),
        ("a.json.gz", b"[]", r"not a whole \.gz file"),
        ("a.json.gz", gzip.compress(b"[]" * 99, mtime=0)[:-9], r"not a whole \.gz file"),
        ("a.txt", b"text\na", r"a\.txt: must be one of \.jsonl, .*\.zst"),
        ("a.jsonl", b'{"text": "\\ud800"}', "a.jsonl:1: text holds half of a surrogate pair"),
    ],
)
def test_a_broken_file_is_named_with_its_line(tmp_path, name, raw, message):
    (tmp_path / name).write_bytes(raw)
    fails(tmp_path / name, match=message)


def test_a_missing_file_and_a_folder(tmp_path):
    fails(tmp_path / "none.json", match="no such file")
    (tmp_path / "folder.json").mkdir()
    fails(tmp_path / "folder.json", match="the folder holds no data file")
