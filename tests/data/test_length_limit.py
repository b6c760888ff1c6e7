"""Examples that are too long: cut, dropped, split or refused, and counted."""

from __future__ import annotations

import itertools

import numpy as np
import pytest
from data_fixtures import BOS, EOS, loaded, make_tokenizer

from droplora_jax.core.errors import InputError

LONG = [
    {"prompt": "0 1 2", "completion": "3 4 5"},
    {"prompt": "0 1 2 3 4 5 6 7 8 9", "completion": "9 8 7 6 5 4 3 2 1 0"},
]


def test_too_long_is_cut(tmp_path):
    tokenizer = make_tokenizer()
    whole, _ = loaded(tmp_path, LONG, tokenizer)
    limit = len(whole[1]) - 3
    rows, report = loaded(tmp_path, LONG, tokenizer, max_length=limit)
    np.testing.assert_array_equal(rows[1].ids, whole[1].ids[:limit])
    np.testing.assert_array_equal(rows[1].trained, whole[1].trained[:limit])
    assert (report.read, report.kept, report.cut, report.dropped) == (2, 2, 1, 0)


def test_too_long_is_dropped(tmp_path):
    tokenizer = make_tokenizer()
    whole, _ = loaded(tmp_path, LONG, tokenizer)
    at_the_limit, report = loaded(tmp_path, LONG, tokenizer, max_length=len(whole[1]))
    assert (len(at_the_limit), report.cut) == (2, 0)
    config = {"max_length": len(whole[1]) - 1, "too_long": "drop"}
    rows, report = loaded(tmp_path, LONG, tokenizer, **config)
    assert (len(rows), report.cut, report.dropped_long) == (1, 0, 1)
    with pytest.raises(InputError, match=r"no row is left.*1 are longer than data\.max_length"):
        loaded(tmp_path, LONG[1:], tokenizer, **config)


def test_too_long_is_an_error(tmp_path):
    tokenizer = make_tokenizer()
    whole, _ = loaded(tmp_path, LONG, tokenizer)
    n = len(whole[1])
    with pytest.raises(InputError, match=rf"row 2: {n} tokens are .*max_length={n - 1}"):
        loaded(tmp_path, LONG, tokenizer, max_length=n - 1, too_long="error")
    assert len(loaded(tmp_path, LONG, tokenizer, max_length=n, too_long="error")[0]) == 2


def test_a_row_cut_within_its_prompt_is_dropped_and_counted(tmp_path):
    tokenizer = make_tokenizer()
    short = {"prompt": "0", "completion": "1"}
    rows, report = loaded(tmp_path, [*LONG, short], tokenizer, max_length=4)
    assert (len(rows), report.cut, report.dropped_unlabelled) == (1, 0, 2)
    with pytest.raises(InputError, match=r"no row is left.*2 have nothing to learn"):
        loaded(tmp_path, LONG, tokenizer, max_length=4)


@pytest.mark.parametrize("adds_bos", [False, True])
@pytest.mark.parametrize("limit", [2, 3, 7, 10, 1000])
def test_plain_text_is_split_and_every_token_predicted_once(tmp_path, adds_bos, limit):
    tokenizer = make_tokenizer(adds_bos=adds_bos)
    for text in ("0", "the answer is 日本 🙂 0 1 2 3 4 5 6 7 8 9"):
        (whole,), _ = loaded(tmp_path, [{"text": text}], tokenizer, max_length=10_000)
        assert tokenizer.decode(whole.ids) == (BOS if adds_bos else "") + text + EOS
        assert whole.trained.tolist() == [False] + [True] * (len(whole) - 1)
        pieces, report = loaded(tmp_path, [{"text": text}], tokenizer, max_length=limit)
        assert all(len(piece) <= limit for piece in pieces)
        targets = [piece.ids[piece.trained] for piece in pieces]
        np.testing.assert_array_equal(np.concatenate(targets), whole.ids[1:])
        for before, after in itertools.pairwise(pieces):
            assert len(before) == limit
            assert after.ids[0] == before.ids[-1]
        split = len(whole) > limit
        assert (report.split, report.pieces) == ((1, len(pieces)) if split else (0, 0))
        assert report.cut == report.dropped == 0


def test_empty_rows_are_dropped_counted_and_named(tmp_path):
    tokenizer = make_tokenizer()
    empty = {"prompt": "0", "completion": " \n"}
    rows, report = loaded(tmp_path, [empty, *LONG, *[empty] * 3], tokenizer)
    assert (len(rows), report.read, report.dropped, report.dropped_empty) == (2, 6, 4, 4)
    assert (
        "2 rows to train on; 0 cut to 1,024 tokens; 4 dropped (4 empty: a.json, row 1: completion, "
        "a.json, row 4: completion, a.json, row 5: completion, ...)"
    ) in report.lines()
    with pytest.raises(InputError, match=r"row 1: completion is empty: .* or set data.empty=drop"):
        loaded(tmp_path, [empty, *LONG], tokenizer, empty="error")
    with pytest.raises(InputError, match=r"no row is left.*1 are empty \(.*row 1: completion\)"):
        loaded(tmp_path, [empty], tokenizer)
