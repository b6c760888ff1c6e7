"""Packing against plain loops: every row once, in no line too many, and in no time."""

from __future__ import annotations

import itertools
import time

import numpy as np
import pytest

from droplora_jax.data.packing import bins, joined, one_example_each, packed

FITS = pytest.mark.parametrize("fit", ["first_fit", "best_fit"])


def naive(sizes: list[int], capacity: int, fit: str) -> list[int]:
    """Every bin is looked at for every item."""
    room: list[int] = []
    found = []
    for size in sizes:
        enough = [i for i, left in enumerate(room) if left >= size]
        if not enough:
            room.append(capacity)
            enough = [len(room) - 1]
        at = enough[0] if fit == "first_fit" else min(enough, key=lambda i: room[i])
        room[at] -= size
        found.append(at)
    return found


@FITS
@pytest.mark.parametrize("capacity", [1, 2, 7, 8, 16, 31, 1000])
def test_bins_against_a_plain_loop(fit, capacity):
    random = np.random.default_rng(capacity)
    for count in (0, 1, 2, 5, 33, 300):
        for largest in {capacity, max(capacity // 3, 1)}:
            sizes = random.integers(1, largest + 1, count)
            assert bins(sizes, capacity, fit).tolist() == naive(sizes.tolist(), capacity, fit)
    with pytest.raises(ValueError, match=f"{capacity + 1} does not fit"):
        bins(np.array([capacity + 1]), capacity, fit)


@FITS
def test_every_row_is_in_one_line_and_no_line_is_too_long(fit):
    random = np.random.default_rng(1)
    lengths = random.integers(1, 17, 500)
    found = packed(lengths, random.permutation(500), 16, fit)
    assert sorted(found.examples.tolist()) == list(range(500))
    parts = [found[line].tolist() for line in range(len(found))]
    assert list(itertools.chain(*parts)) == found.examples.tolist()
    assert all(0 < sum(lengths[part]) <= 16 for part in parts)
    most = 1.15 if fit == "first_fit" else 1.02
    assert len(found) < most * lengths.sum() / 16


def test_best_fit_goes_from_long_rows_to_short_ones():
    found = packed(np.array([3, 5, 2, 6, 2]), np.arange(5), 8, "best_fit")
    assert [found[line].tolist() for line in range(3)] == [[3, 2], [1, 0], [4]]


def test_lines_of_several_sources():
    assert [one_example_each(3)[line].tolist() for line in range(3)] == [[0], [1], [2]]
    first = packed(np.array([3, 4, 1]), np.array([2, 1, 0]), 5, "first_fit")
    both = joined([first, one_example_each(2)])
    assert [both[line].tolist() for line in range(len(both))] == [[2, 1], [0], [3], [4]]


@FITS
def test_many_rows_pack_in_seconds(fit):
    lengths = np.random.default_rng(2).integers(20, 1025, 100_000)
    start = time.process_time()
    found = packed(lengths, np.arange(len(lengths)), 1024, fit)
    assert time.process_time() - start < 10  # half a second where nothing else runs
    assert len(found.examples) == len(lengths)
