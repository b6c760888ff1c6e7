"""The quantiles of lengths in a report."""

from __future__ import annotations

from collections import Counter

import numpy as np
import pytest
from data_fixtures import PAIR, loaded, make_tokenizer, write_json

from droplora_jax.data.config import DataConfig
from droplora_jax.data.load import load
from droplora_jax.data.report import quantile


@pytest.mark.parametrize("seed", range(4))
def test_quantiles_are_numpys(seed):
    random = np.random.default_rng(seed)
    values = random.integers(1, 50, 1 + 7 * seed)
    counts = sorted(Counter(values.tolist()).items())
    for part in (0.0, 0.5, 0.9, 0.99, 1.0):
        assert quantile(counts, part) == np.quantile(values, part, method="inverted_cdf")


LONG = [
    {"prompt": "0 1 2", "completion": "3 4 5"},
    {"prompt": "0 1 2 3 4 5 6 7 8 9", "completion": "9 8 7 6 5 4 3 2 1 0"},
]


def test_the_report(tmp_path):
    tokenizer = make_tokenizer()
    data = [*LONG, {"prompt": "0", "completion": "1"}]
    whole, _ = loaded(tmp_path, data, tokenizer)
    limit = len(whole[1]) - 1
    rows, report = loaded(tmp_path, data, tokenizer, max_length=limit)
    lengths = sorted(len(r) for r in whole)
    assert report.lengths == tuple((length, 1) for length in lengths)
    assert report.tokens == sum(len(r) for r in rows) == sum(lengths) - 1
    assert report.trained_tokens == sum(int(r.trained.sum()) for r in rows)
    first, changes, trained, sizes = report.lines()
    assert first == f"3 rows from {tmp_path / 'a.json'} (prompt_completion, template none)"
    assert changes == f"3 rows to train on; 1 cut to {limit} tokens; 0 dropped"
    share = report.trained_tokens / report.tokens
    assert trained == f"{share:.0%} of {report.tokens} tokens are trained"
    low, middle, high = lengths
    assert sizes == (
        f"lengths in tokens: {low} / {middle} / {high} / {high} / {high} "
        f"(min / 50% / 90% / 99% / max), 1 above max_length={limit}"
    )
    _, report = loaded(tmp_path, data, tokenizer, max_length=limit, too_long="drop")
    assert f"1 dropped (1 of more than {limit} tokens)" in report.lines()[1]
    _, report = loaded(tmp_path, [{"text": "0123456789"}], tokenizer, max_length=4)
    assert f"1 split into {report.pieces} of at most 4 tokens;" in report.lines()[1]


def test_the_report_of_many_files_shows_a_few(tmp_path):
    tokenizer = make_tokenizer()
    paths = [write_json(tmp_path / f"{i}.json", [PAIR]) for i in range(11)]
    _, report = load(paths, tokenizer, DataConfig(train="x"))
    lines = report.lines()
    assert [f"/{i}.json" in lines[i] for i in range(8)] == [True] * 8
    assert lines[8:10] == ["3 rows from 3 more files", lines[9]]
    assert lines[9].startswith("11 rows to train on")
