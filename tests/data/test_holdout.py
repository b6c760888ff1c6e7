"""Held-out examples depend on the seed and on their content alone."""

from __future__ import annotations

import numpy as np
import pytest
from data_fixtures import random_rows, sources

from droplora_jax.core.errors import InputError
from droplora_jax.data.holdout import held_out, mixed
from droplora_jax.data.rows import Flat, Rows

T = 16


def texts(rows) -> list[bytes]:
    return [row.ids.tobytes() for row in rows]


@pytest.mark.parametrize("fraction", [0.01, 0.1, 0.5, 0.9])
def test_each_row_is_on_one_side(fraction):
    rows = sources(150, 50)
    train, valid = held_out(rows, fraction, seed=3)
    assert len(valid) == round(200 * fraction)
    assert sorted(texts(train) + texts(valid)) == sorted(texts(rows))
    kept = set(texts(train))
    assert texts(train) == [text for text in texts(rows) if text in kept]
    assert sum(train.counts) == len(train)


def test_the_sides_do_not_depend_on_order_or_files():
    rows = random_rows(200, T, seed=0)
    order = np.random.default_rng(0).permutation(200)
    one = held_out(Rows.of(rows), 0.2, seed=1)[1]
    two = held_out(Rows.of(rows[i] for i in order), 0.2, seed=1)[1]
    three = held_out(sources(20, 80, 100), 0.2, seed=1)[1]
    assert set(texts(one)) == set(texts(two)) == set(texts(three))
    assert set(texts(one)) != set(texts(held_out(Rows.of(rows), 0.2, seed=2)[1]))


def test_equal_rows_and_pieces_of_a_text_are_on_one_side():
    rows = random_rows(60, T, seed=0)
    doubled = held_out(Rows.of(rows * 3), 0.2, seed=0)
    assert not set(texts(doubled[0])) & set(texts(doubled[1]))
    assert len(doubled[1]) % 3 == 0
    pieces = [[rows[i], rows[i + 1]] for i in range(0, 60, 2)]
    train, valid = held_out(Rows([[Flat.of(pieces)]]), 0.2, seed=0)
    for first, second in pieces:
        assert (first.ids.tobytes() in texts(train)) == (second.ids.tobytes() in texts(train))
    assert len(valid) == 12


def test_few_sides_change_when_rows_are_added():
    rows = random_rows(1000, T, seed=0)
    before = set(texts(held_out(Rows.of(rows[:900]), 0.1, seed=0)[1]))
    after = set(texts(held_out(Rows.of(rows), 0.1, seed=0)[1]))
    assert len(before - after) < 20


@pytest.mark.parametrize(
    ("rows", "fraction", "message"),
    [
        (sources(4), 0.1, "data.valid_fraction=0.1 of 4 rows is none; raise it"),
        (Rows.of(random_rows(1, T, seed=0) * 9), 0.1, r"of \[9\] rows of the sources, \[9\] would"),
        (sources(1, 9), 0.95, r"too few left"),
    ],
)
def test_sides_that_can_not_be(rows, fraction, message):
    with pytest.raises(InputError, match=message):
        held_out(rows, fraction, seed=0)


def test_marks_are_spread_evenly():
    marks = mixed(np.arange(100_000, dtype=np.uint64), seed=0)
    counts = np.bincount((marks >> np.uint64(60)).astype(int))
    assert len(counts) == 16
    assert abs(counts - 6250).max() < 5 * 80
