"""Every kind of file, packed or not, against the libraries that wrote them; and broken ones."""

from __future__ import annotations

import bz2
import csv
import gzip
import io
import json
import lzma
import tracemalloc
from functools import partial

import datasets
import numpy as np
import pandas as pd
import pyarrow as pa
import pyarrow.csv
import pyarrow.feather
import pyarrow.parquet
import pytest

from droplora_jax.core.errors import InputError
from droplora_jax.data.data_file import UNPACKERS, File, local
from droplora_jax.data.readers import READERS, json_list
from droplora_jax.data.sources import files_of

ROWS = [
    {"prompt": f'{i} "é, 日本" 🙂\n', "completion": "a\u2028b" + "\\ud83d" * (i % 3)}
    for i in range(1200)
]


def zstandard(raw: bytes) -> bytes:
    out = pa.BufferOutputStream()
    with pa.CompressedOutputStream(out, "zstd") as stream:
        stream.write(raw)
    return out.getvalue().to_pybytes()


def table() -> pa.Table:
    return pa.Table.from_pylist(ROWS)


def as_csv(delimiter: str) -> bytes:
    out = io.StringIO(newline="")
    writer = csv.DictWriter(out, ROWS[0], delimiter=delimiter)
    writer.writeheader()
    writer.writerows(ROWS)
    return out.getvalue().encode()


def as_parquet(path) -> None:
    pa.parquet.write_table(table(), path, row_group_size=500)


def as_stream(path) -> None:
    with pa.ipc.new_stream(path, table().schema) as out:
        out.write_table(table(), max_chunksize=500)


def as_file(path) -> None:
    with pa.ipc.new_file(path, table().schema) as out:
        out.write_table(table(), max_chunksize=500)


def as_lines(path) -> None:
    path.write_text("".join(json.dumps(row, ensure_ascii=False) + "\n" for row in ROWS), "utf-8")


KINDS = {
    "a.jsonl": as_lines,
    "a.ndjson": as_lines,
    "a.json": lambda path: path.write_text(json.dumps(ROWS, indent=1)),
    "b.json": lambda path: path.write_text(json.dumps(ROWS, ensure_ascii=False), "utf-8"),
    "a.csv": lambda path: path.write_bytes(as_csv(",")),
    "a.tsv": lambda path: path.write_bytes(as_csv("\t")),
    "a.parquet": as_parquet,
    "stream.arrow": as_stream,
    "file.arrow": as_file,
}
PACKERS = {
    "": bytes,
    ".gz": partial(gzip.compress, mtime=0),
    ".bz2": bz2.compress,
    ".xz": lzma.compress,
    ".zst": zstandard,
}


def test_everything_that_is_read_is_tried():
    assert {f".{name.split('.')[1]}" for name in KINDS} == READERS.keys()
    assert PACKERS.keys() - {""} == UNPACKERS.keys()


# Every kind by itself; every packing with a kind that is read in order, and with one that seeks.
NAMES_PACKED = [
    *((name, "") for name in KINDS),
    *((name, packed) for packed in PACKERS if packed for name in ("b.json", "file.arrow")),
    ("a.jsonl", ".gz"),
    ("a.csv", ".bz2"),
    ("stream.arrow", ".xz"),
    ("a.parquet", ".zst"),
]


@pytest.mark.parametrize(("name", "packed"), NAMES_PACKED)
def test_the_rows_of_a_file(tmp_path, monkeypatch, name, packed):
    monkeypatch.setattr(json_list, "_PART", 997)  # so that text is cut anywhere
    path = tmp_path / name
    KINDS[name](path)
    if packed:
        (tmp_path / (name + packed)).write_bytes(PACKERS[packed](path.read_bytes()))
    found = list(local(tmp_path / (name + packed)).records())
    assert [row for _, row in found] == ROWS
    where = [place for place, _ in found]
    assert len(set(where)) == len(ROWS)
    if name in ("a.jsonl", "a.ndjson"):
        assert where[-1] == f"{path}{packed}:{len(ROWS)}"
    elif name in ("a.csv", "a.tsv"):  # whose rows here have two lines each
        assert where[:2] == [f"{path}{packed}:2", f"{path}{packed}:4"]
    else:
        assert where[-1] == f"{path}{packed}, row {len(ROWS)}"


@pytest.mark.parametrize("packed", [p for p in PACKERS if p])
@pytest.mark.parametrize("name", ["a.jsonl", "a.parquet"])
def test_a_packed_file_that_is_cut_short(tmp_path, name, packed):
    KINDS[name](tmp_path / name)
    path = tmp_path / (name + packed)
    whole = PACKERS[packed]((tmp_path / name).read_bytes())
    for raw in (whole[: len(whole) // 2], b"no packed file at all", b""):
        path.write_bytes(raw)
        with pytest.raises(InputError, match=r"(not a whole|the file is empty)") as error:
            list(local(path).records())
        assert str(error.value).startswith(f"{path}: ")


@pytest.mark.parametrize("name", ["a.parquet", "stream.arrow", "file.arrow"])
def test_a_table_that_is_cut_short(tmp_path, name):
    path = tmp_path / name
    KINDS[name](path)
    whole = path.read_bytes()
    for raw in (whole[: len(whole) // 2], b"nothing of the kind", b""):
        path.write_bytes(raw)
        with pytest.raises(InputError, match=r"not a whole|the file is empty") as error:
            list(local(path).records())
        assert str(error.value).startswith(f"{path}: ")


@pytest.mark.parametrize(
    ("raw", "message"),
    [
        (b"a,b\n1,2\n1,2,3\n", r"a.csv:3: 3 values, but the first line names 2 columns \(a, b\)"),
        (b'a,b\n"1\n1",2\n1\n', "a.csv:4: 1 values, but"),
        (b"a,a\n1,2\n", "a.csv:1: the first line must name the columns, each once, and holds 'a'"),
        (b",\n1,2\n", "a.csv:1: the first line must name .* holds ''"),
        (b"a,b\n1,2\na, b\n", "a.csv:3: this row repeats the names of the columns"),
        (b'a,b\n1,2\n3,"4\n5,6\n', "a.csv:3: the row that begins here is broken"),
        (b"a,b\n1,\xff\n", "a.csv:2: not UTF-8 .byte 0xff."),
        (b"a,b\n", "a.csv: the file is empty"),
        (b"", "a.csv: the file is empty"),
    ],
)
def test_a_broken_table_of_text(tmp_path, raw, message):
    path = tmp_path / "a.csv"
    for mark in (b"", b"\xef\xbb\xbf"):
        path.write_bytes(mark + raw)
        with pytest.raises(InputError, match=message):
            list(local(path).records())


def test_a_long_value_of_a_table_leaves_the_limit_of_the_process_alone(tmp_path):
    before = csv.field_size_limit()
    path = tmp_path / "a.csv"
    path.write_text(f"text\n{'x' * (before + 1)}\n")
    ((_, row),) = local(path).records()
    assert len(row["text"]) == before + 1
    assert csv.field_size_limit() == before


@pytest.mark.parametrize(
    ("name", "begin", "end"),
    [
        ("a.jsonl", b'{"text": "a"}\n{"text": "', b'"}\n'),
        ("a.json", b'[{"text": "a"},\n{"text": "', b'"}]'),
        ("a.json", b'\n{"data": [{"text": "', b'"}]}'),
        ("a.csv", b"text\na\n", b"\n"),
    ],
)
def test_a_line_of_a_hundred_megabytes_is_refused(tmp_path, name, begin, end):
    path = tmp_path / name
    path.write_bytes(begin + b"x" * 10**8 + end)
    line = 3 if name == "a.csv" else 2
    with pytest.raises(InputError, match=f"{name}:{line}: the .* longer than 64 MiB"):
        list(local(path).records())


@pytest.mark.parametrize(
    ("raw", "message"),
    [
        (b'[{"a": 1} {"a": 2}]', "a.json:1: broken JSON .Expecting ',' delimiter."),
        (b'[{"a": 1},\n]', "a.json:2: broken JSON"),
        (b'[{"a": 1},\n\n{"a": tru}]', "a.json:3: broken JSON"),
        (b'[{"a": 1},\n{"a": 1}', "a.json:2: broken JSON"),
        (b'[{"a": 1},\n{"a": "1', "a.json:2: broken JSON"),
        (b'[{"a": 1}]\n\n3', "a.json:3: broken JSON .Extra data."),
        (b'[{"a": "x"},\n{"a": "\xff"}]', "a.json:2: not UTF-8 .byte 0xff."),
        (b'[{"a": 1},\n{"a": "\xf0\x9f', "a.json:2: not UTF-8"),
        (b'[{"a": 1}, 7]', "a.json, row 2: must be an object with keys, is 7"),
    ],
)
@pytest.mark.parametrize("part", [3, 2**20])
def test_a_broken_list(tmp_path, monkeypatch, raw, message, part):
    monkeypatch.setattr(json_list, "_PART", part)
    path = tmp_path / "a.json"
    path.write_bytes(raw)
    with pytest.raises(InputError, match=message):
        list(local(path).records())


@pytest.mark.parametrize("part", [1, 2, 5])
def test_values_that_are_read_in_pieces(tmp_path, monkeypatch, part):
    monkeypatch.setattr(json_list, "_PART", part)
    rows = [{"a": v} for v in (12345, -1.5e-300, True, None, [1, {"b": "🙂é"}], "", "\\")]
    path = tmp_path / "a.json"
    for ascii in (True, False):
        path.write_text(json.dumps(rows, ensure_ascii=ascii, indent=2) + " \n", "utf-8")
        assert [row for _, row in local(path).records()] == rows


@pytest.mark.parametrize("name", ["a.jsonl", "a.json", "a.csv", "a.parquet", "stream.arrow"])
def test_no_more_of_a_file_is_in_memory_than_is_looked_at(tmp_path, monkeypatch, name):
    monkeypatch.setattr(json_list, "_PART", 2**17)
    path = tmp_path / name
    text = "".join(map(chr, np.random.default_rng(0).integers(97, 123, 2000)))
    rows = [{"n": str(i), "text": text} for i in range(3000)]
    if name == "a.jsonl":
        path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    elif name == "a.json":
        path.write_text(json.dumps(rows))
    elif name == "a.csv":
        pa.csv.write_csv(pa.Table.from_pylist(rows), path)
    elif name == "a.parquet":
        pa.parquet.write_table(
            pa.Table.from_pylist(rows),
            path,
            compression="none",
            use_dictionary=False,
            row_group_size=1000,
        )
    else:
        with pa.ipc.new_stream(path, pa.Table.from_pylist(rows).schema) as out:
            out.write_table(pa.Table.from_pylist(rows), max_chunksize=1000)
    del rows
    assert path.stat().st_size > 6e6
    tracemalloc.start()
    try:
        assert sum(1 for _ in local(path).records()) == 3000
        assert tracemalloc.get_traced_memory()[1] < 5e6
    finally:
        tracemalloc.stop()


def test_what_tells_files_apart(tmp_path):
    path = tmp_path / "a.jsonl"
    path.write_text("1")
    file = File("a", path)
    assert file.sha256() == "6b86b273ff34fce19d6b804eff5a3f5747ada4eaa22f1d49c01e52ddb7875b4b"
    with pytest.raises(InputError, match="none.jsonl: no such file"):
        File("none.jsonl", tmp_path / "none.jsonl").sha256()


# --- files as other tools leave them --------------------------------------------------------------

FEW = [
    {"instruction": "Name a fruit.", "output": "An apple; or a pear,\na \u201cquince\u201d"},
    {"instruction": "\U0001f642?", "output": 'a "b"\tc'},
]
LINES = [json.dumps(row, ensure_ascii=False) + "\n" for row in FEW]
MARK = "\ufeff"


def cells(delimiter: str, rows: list = FEW, index: bool = False) -> str:
    frame = pd.DataFrame(rows, dtype=str)
    return frame.to_csv(None, sep=delimiter, index=index, lineterminator="\r\n")


def frame_json(**options) -> str:
    return pd.DataFrame(FEW, dtype=str).to_json(None, force_ascii=False, **options)


AS_LEFT = {
    "a list called lines": ("a.jsonl", "\n" + json.dumps(FEW, indent=1)),
    "lines called json": ("a.json", "".join(LINES)),
    "lines of marked files, joined": ("a.jsonl", LINES[0] + MARK + LINES[1]),
    "the same called json": ("a.json", LINES[0] + MARK + LINES[1]),
    "objects over several lines": ("a.json", "\n".join(json.dumps(r, indent=1) for r in FEW)),
    "rows under a key": ("a.json", json.dumps({"version": "1", "data": FEW})),
    "rows under another": ("a.json", json.dumps({"type": "x", "instances": FEW})),
    "columns": ("a.json", json.dumps({k: [r[k] for r in FEW] for k in FEW[0]})),
    "pandas, columns": ("a.json", frame_json()),
    "pandas, index": ("a.json", frame_json(orient="index")),
    "pandas, table": ("a.json", frame_json(orient="table", index=False)),
    "pandas, lines": ("a.json", frame_json(orient="records", lines=True)),
    "semicolons": ("a.csv", cells(";")),
    "tabs": ("a.csv", cells("\t")),
    "a stated delimiter": ("a.csv", "sep=;\r\n" + cells(";")),
    "bars": ("a.csv", cells("|")),
    "commas": ("a.tsv", cells(",")),
    "pandas' index": ("a.csv", cells(",", index=True)),
    "pandas' index and semicolons": ("a.csv", cells(";", index=True)),
    "a column without a name": ("a.csv", cells(",", [{**row, " ": ""} for row in FEW])),
}


@pytest.mark.parametrize("encoding", ["utf-8", "utf-8-sig", "utf-16", "utf-32"])
@pytest.mark.parametrize("kind", AS_LEFT)
def test_rows_as_other_tools_leave_them(tmp_path, kind, encoding):
    name, text = AS_LEFT[kind]
    (tmp_path / name).write_bytes(text.encode(encoding))
    (tmp_path / f"{name}.gz").write_bytes(gzip.compress(text.encode(encoding), mtime=0))
    for path in (tmp_path / name, tmp_path / f"{name}.gz"):
        assert [row for _, row in local(path).records()] == FEW


@pytest.mark.parametrize("part", [3, 2**20])
def test_lines_called_json_are_named_by_their_lines(tmp_path, monkeypatch, part):
    monkeypatch.setattr(json_list, "_PART", part)
    path = tmp_path / "a.json"
    path.write_text('\n{"a": 1}\n\n{"a": 2} {"a": 3}\n[4]\n')
    places = [(where, row) for where, row in local(path).read() if isinstance(row, dict)]
    assert places == [
        (f"{path}:2", {"a": 1}),
        (f"{path}:4", {"a": 2}),
        (f"{path}:4", {"a": 3}),
    ]
    with pytest.raises(InputError, match="a.json:5: must be an object with keys, is a list"):
        list(local(path).records())


def test_one_conversation_called_json_is_a_row(tmp_path):
    row = {"messages": [{"role": "user"}, {"role": "assistant"}], "tools": [{"a": 1}, {"b": 2}]}
    path = tmp_path / "a.json"
    path.write_text(json.dumps(row))
    assert list(local(path).records()) == [(f"{path}:1", row)]


def test_text_that_is_not_what_its_first_bytes_say(tmp_path):
    path = tmp_path / "a.jsonl"
    path.write_bytes("".join(LINES).encode("utf-16")[:-1])
    with pytest.raises(InputError, match=r"a\.jsonl: begins as UTF-16 and is not"):
        list(local(path).records())


@pytest.mark.parametrize(
    ("name", "raw", "good"),
    [
        ("a.jsonl", b'{"a": 1}\n{"a": \n{"a": "\xff"}\n[2]\n{"a": 3}\n', 2),
        ("a.json", b'[{"a": 1}, 7, {"a": 3}]', 2),
        ("a.json", b'{"a": 1}\n7\n{"a": 3}', 2),
        ("a.csv", b"a,b\n1,2\n1\n1,2,3\n3,4\n", 2),
    ],
)
def test_what_follows_a_bad_row_is_read(tmp_path, name, raw, good):
    path = tmp_path / name
    path.write_bytes(raw)
    rows = list(local(path).read())
    assert [isinstance(row, InputError) for _, row in (rows[0], rows[-1])] == [False, False]
    bad = [(where, row) for where, row in rows if isinstance(row, InputError)]
    assert len(rows) - len(bad) == good
    assert all(str(error).startswith(f"{where}: ") for where, error in bad)


# --- columns of Arrow -----------------------------------------------------------------------------

CALL = {"name": "find", "arguments": {"what": "a"}}
OTHER = {"name": "sum", "arguments": {"n": [1, 2]}}
ASKED = [
    {"messages": [{"role": "user", "content": "a"}, {"role": "x", "calls": [CALL, OTHER]}]},
    {"messages": [{"role": "user", "content": None, "n": [1, None]}]},
]


def test_fields_that_a_row_never_had_are_left_out(tmp_path):
    """Also those of objects in lists in objects; nulls of lists and of columns remain."""
    path = tmp_path / "a.parquet"
    pa.parquet.write_table(pa.Table.from_pylist([{**ASKED[0], "b": 1}, ASKED[1]]), path)
    first, second = (row for _, row in local(path).records())
    assert first == {**ASKED[0], "b": 1}
    assert second == {"messages": [{"role": "user", "n": [1, None]}], "b": None}


def test_json_of_the_datasets_library(tmp_path):
    datasets.Dataset.from_list(ASKED, on_mixed_types="use_json").to_parquet(tmp_path / "a.parquet")
    datasets.Dataset.from_list(ASKED, on_mixed_types="use_json").save_to_disk(tmp_path / "b")
    kinds = datasets.Features({"messages": datasets.List(datasets.Json())})
    datasets.Dataset.from_list(ASKED, features=kinds).to_parquet(tmp_path / "c.parquet")
    for place in (tmp_path / "a.parquet", tmp_path / "b", tmp_path / "c.parquet"):
        rows = [row for file in files_of(str(place)) for _, row in file.records()]
        assert rows[0] == ASKED[0]


@pytest.mark.parametrize(
    "values", [pa.array([2**62, 1], pa.timestamp("us")), pa.array([10**9, 1], pa.date32())]
)
def test_a_column_that_nobody_reads_is_not_converted(tmp_path, values):
    """Its values have no counterpart in Python; those in nanoseconds have one in pandas alone."""
    path = tmp_path / "a.parquet"
    pa.parquet.write_table(pa.table({"text": ["a", "b"], "at": values}), path)
    rows = [row for _, row in local(path).records()]
    assert [row["text"] for row in rows] == ["a", "b"]
    assert "at" in rows[0]
    with pytest.raises(InputError, match=r"the column at of .* holds a value that can't be read"):
        rows[0]["at"]


def test_a_column_of_json_that_is_broken(tmp_path):
    table = pa.table({"text": ["a"], "more": pa.array(["{"], pa.json_())})
    with pa.ipc.new_stream(tmp_path / "a.arrow", table.schema) as out:
        out.write_table(table)
    ((_, row),) = local(tmp_path / "a.arrow").records()
    assert row["text"] == "a"
    with pytest.raises(InputError, match="the column more of extension<arrow.json> holds a value"):
        row["more"]
