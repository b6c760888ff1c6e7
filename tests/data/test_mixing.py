"""Mixtures keep their weights, and every source goes through epochs of its own."""

from __future__ import annotations

import numpy as np
import pytest
from data_fixtures import sources

from droplora_jax.core.errors import InputError
from droplora_jax.data.batches import Batches
from droplora_jax.data.mixing import Schedule

T = 16


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
