"""Rows as one sequence over several files, and selections of them."""

from __future__ import annotations

import numpy as np
import pytest
from data_fixtures import assert_rows_equal, make_tokenizer, random_rows, write_jsonl

from droplora_jax.data.config import DataConfig
from droplora_jax.data.load import load
from droplora_jax.data.rows import Flat, Rows


def test_rows_are_a_sequence():
    parts = random_rows(7, 5, seed=0)
    rows = Rows.of(parts)
    assert rows.lengths.tolist() == [len(part) for part in parts]
    for got, part in zip(rows, parts, strict=True):
        np.testing.assert_array_equal(got.ids, part.ids)
        np.testing.assert_array_equal(got.trained, part.trained)
    assert rows[-1].ids.tolist() == parts[-1].ids.tolist()
    assert [len(r) for r in rows[2:4]] == [len(parts[2]), len(parts[3])]
    with pytest.raises(IndexError):
        rows[7]


def test_rows_of_several_files_and_some_of_them():
    parts = random_rows(20, 9, seed=0)
    flats = [Flat.of([row] for row in parts[a:b]) for a, b in [(0, 5), (5, 5), (5, 12), (12, 20)]]
    rows = Rows([flats[:2], flats[2:]])
    assert rows.counts == [5, 15]
    assert_rows_equal(rows, parts)
    chosen = np.array([0, 4, 5, 11, 12, 19])
    some = rows.only(chosen)
    assert some.counts == [2, 4]
    assert_rows_equal(some, [parts[i] for i in chosen])
    assert some.lengths.tolist() == [len(parts[i]) for i in chosen]
    assert_rows_equal(some.only(np.array([1, 5])), [parts[4], parts[19]])
    assert some.only(np.array([1, 5])).counts == [1, 1]
    assert rows.largest_id == max(int(row.ids.max()) for row in parts)
    assert rows.trained_tokens == sum(int(row.trained.sum()) for row in parts)


def test_pieces_of_a_text_have_its_key_and_equal_rows_an_equal_one(tmp_path):
    texts = ["0123456789" * 3, "true", "0123456789" * 3, "false"]
    path = write_jsonl(tmp_path / "a.jsonl", [{"text": text} for text in texts])
    rows, report = load(path, make_tokenizer(), DataConfig(train=path, max_length=8))
    assert report.split == 2
    pieces = report.pieces // 2
    keys = rows.keys.tolist()
    assert len(set(keys)) == 3
    assert keys[:pieces] == keys[pieces + 1 : -1] == keys[:1] * pieces
