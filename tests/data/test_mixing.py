"""Mixtures keep their weights, and what is held out depends on what a row holds alone."""

from __future__ import annotations

import itertools

import numpy as np
import pytest
from data_fixtures import random_rows

from droplora_jax.core.errors import InputError
from droplora_jax.data.batches import Batches
from droplora_jax.data.holdout import held_out, mixed
from droplora_jax.data.mixing import Schedule
from droplora_jax.data.rows import Flat, Rows

T = 16


def sources(*counts: int) -> Rows:
    """Rows of several sources, in which every token occurs once."""
    rows = random_rows(sum(counts), T, seed=0)
    ends = list(itertools.accumulate(counts, initial=0))
    parts = [rows[a:b] for a, b in itertools.pairwise(ends)]
    return Rows([[Flat.of([row] for row in part)] for part in parts])


def batches(rows, weights, **options):
    settings = {"batch_size": 5, "seed": 0, "shuffle": True, "max_length": T} | options
    return Batches(rows, weights=weights, **settings)


@pytest.mark.parametrize(
    ("weights", "shares"),
    [
        ((1.0,), [1]),
        ((0.7, 0.3), [7, 3]),
        ((3.0, 1.0), [3, 1]),
        ((0.1, 0.25, 0.125), [4, 10, 5]),
        ((1e-3, 1.0), [1, 1000]),
    ],
)
def test_every_turn_has_each_source_in_its_share_spread_evenly(weights, shares):
    schedule = Schedule(weights)
    turn = sum(shares)
    drawn = [schedule[i] for i in range(3 * turn)]
    for k, share in enumerate(shares):
        assert [number for source, number in drawn if source == k] == list(range(3 * share))
        at = np.array([source == k for source, _ in drawn])
        ideal = np.arange(1, 3 * turn + 1) * share / turn
        assert np.abs(np.cumsum(at) - ideal).max() <= len(shares) / 2 + 0.5
    far = 10**15
    assert schedule[far * turn] == (drawn[0][0], far * shares[drawn[0][0]] + drawn[0][1])


def test_weights_that_can_not_be_kept():
    with pytest.raises(InputError, match=r"data\.train: the weights 1\.0, 1e-07 can't be kept"):
        Schedule((1.0, 1e-7))


@pytest.mark.parametrize("packing", [None, "first_fit", "best_fit"])
def test_a_mixture_takes_lines_by_weight_and_each_source_goes_through_its_own_epochs(packing):
    rows = sources(30, 4)
    made = batches(rows, (3.0, 1.0), packing=packing)
    source = {int(rows[i].ids[0]): int(i >= 30) for i in range(34)}
    lines = [line for n in range(80) for line in made[n]["tokens"]]
    own = {k: [line for line in lines if source[int(line[0])] == k] for k in (0, 1)}
    assert (len(own[0]), len(own[1])) == (300, 100)
    for k, count in ((0, 30), (1, 4)):
        once = len({line.tobytes() for line in own[k]})
        if packing is None:
            assert once == count
        for start in range(0, len(own[k]) - once + 1, once):
            epoch = own[k][start : start + once]
            assert len({line.tobytes() for line in epoch}) == once
    for line in lines:  # no line has rows of both
        starts = [int(token) for token in line if int(token) in source]
        assert len({source[token] for token in starts}) == 1


def test_batches_of_one_line_of_a_mixture_are_the_lines_of_larger_ones():
    rows = sources(9, 5)
    single, five = (batches(rows, (3.0, 1.0), batch_size=g) for g in (1, 5))
    for n in range(12):
        assert [int(single.indices[5 * n + g][0]) for g in range(5)] == list(five.indices[n])


def test_a_mixture_is_a_function_of_rows_seed_and_index():
    rows = sources(9, 5, 7)
    weights = (0.5, 0.2, 0.3)
    one, other = (batches(rows, weights, packing="best_fit") for _ in range(2))
    for n in (7, 0, 10**9):
        for name, array in one[n].items():
            np.testing.assert_array_equal(array, other[n][name])
    assert not np.array_equal(one[0]["tokens"], batches(rows, weights, seed=1)[0]["tokens"])


def test_an_epoch_of_a_mixture_is_as_many_lines_as_its_sources_have():
    made = batches(sources(30, 4), (3.0, 1.0))
    assert made.sequences_per_epoch == 34
    assert made.steps(2.0) == 14


def test_without_weights_sources_are_one_after_the_other():
    rows = sources(3, 2)
    made = batches(rows, None, shuffle=False)
    assert [int(line[0]) for line in made[0]["tokens"]] == [int(row.ids[0]) for row in rows]


@pytest.mark.parametrize("packing", [None, "first_fit", "best_fit"])
def test_utilisation(packing):
    rows = sources(40)
    made = batches(rows, None, packing=packing)
    once = [made.take(indices) for indices in made.all_indices()]
    filled = sum(int((batch["segment_ids"] > 0).sum()) for batch in once)
    assert made.utilisation == filled / (made.sequences_per_epoch * T)
    assert (packing is None) == (made.utilisation < 0.8)


# --- held out -------------------------------------------------------------------------------------


def texts(rows) -> list[bytes]:
    return [row.ids.tobytes() for row in rows]


@pytest.mark.parametrize("fraction", [0.01, 0.1, 0.5, 0.9])
def test_each_row_is_on_one_side(fraction):
    rows = sources(150, 50)
    train, valid = held_out(rows, fraction, seed=3)
    assert len(valid) == round(200 * fraction)
    assert sorted(texts(train) + texts(valid)) == sorted(texts(rows))
    assert texts(train) == [text for text in texts(rows) if text in set(texts(train))]
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
