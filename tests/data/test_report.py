"""Bars of lengths: every record in one of them."""

from __future__ import annotations

from collections import Counter

import numpy as np
import pytest

from droplora_jax.data.histogram import Bar, bars, drawn, quantile


@pytest.mark.parametrize("seed", range(20))
def test_every_record_is_in_one_bar(seed):
    random = np.random.default_rng(seed)
    limit = int(random.integers(2, 3000))
    lengths = Counter((1 + random.lognormal(5, 2, 500).astype(int)).tolist())
    found = bars(lengths, limit)
    assert sum(bar.records for bar in found) == 500
    assert len(found) <= 11
    for low, high, records in found:
        upto = high or max(lengths)
        assert records == sum(n for length, n in lengths.items() if low <= length <= upto)
    assert sum(bar.records for bar in found if bar.high is None) <= 25
    for line, bar in zip(drawn(found, -1), found, strict=True):
        assert line.endswith(f"  {bar.records:,}")
        assert ("█" in line or "▏" in line) == (bar.records > 0)


@pytest.mark.parametrize(
    ("lengths", "limit", "expected"),
    [
        ({7: 2}, 10, [Bar(7, 7, 2)]),
        ({1: 1, 10: 1}, 20, [Bar(i, i, int(i in (1, 10))) for i in range(1, 11)]),
        ({95: 99, 310: 1}, 94, [Bar(95, 95, 99), Bar(96, None, 1)]),
        (
            {95: 99, 310: 1},
            300,
            [Bar(i, min(i + 49, 300), 99 * (i == 50)) for i in range(50, 301, 50)]
            + [Bar(301, None, 1)],
        ),
        ({20: 1}, 10, [Bar(20, 20, 1)]),
        # Nearly all are longer than the limit: how long they are shows what it should be.
        (
            {250: 1, 320: 98, 9000: 1},
            256,
            [
                Bar(i, min(i + 9, 320), n)
                for i, n in zip(range(250, 321, 10), [1, 0, 0, 0, 0, 0, 0, 98], strict=True)
            ]
            + [Bar(321, None, 1)],
        ),
    ],
)
def test_bars(lengths, limit, expected):
    assert bars(lengths, limit) == expected


def test_the_longest_bar_is_the_commonest_and_the_limit_is_marked():
    found = [Bar(1, 2, 1000), Bar(3, 4, 0), Bar(5, None, 1)]
    lines = [
        "       1 - 2  " + "█" * 32 + "  1,000",
        "       3 - 4  " + " " * 32 + "  0",
        "  5 and more  " + "▏".ljust(32) + "  1",
    ]
    assert drawn(found, 3) == [lines[0], lines[1] + "  < max_length=3", lines[2]]
    assert drawn(found, 4) == [lines[0], lines[1] + "  < max_length=4", lines[2]]
    assert drawn(found[:2], 4) == [f"  {line[7:]}" for line in lines[:2]]


@pytest.mark.parametrize("seed", range(10))
def test_quantiles_are_numpys(seed):
    random = np.random.default_rng(seed)
    values = random.integers(1, 50, 1 + 7 * seed)
    counts = sorted(Counter(values.tolist()).items())
    for part in (0.0, 0.25, 0.5, 0.9, 1.0):
        assert quantile(counts, part) == np.quantile(values, part, method="inverted_cdf")
