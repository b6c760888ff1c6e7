"""Batches made ahead are the batches, in order, and the steps do not wait for them."""

from __future__ import annotations

import threading
import time
from contextlib import closing

import numpy as np
import pytest
from data_fixtures import random_rows

from droplora_jax.core.config import MeshConfig
from droplora_jax.core.sharding import make_mesh
from droplora_jax.data.batches import Batches
from droplora_jax.data.device_feed import feed, once
from droplora_jax.data.rows import Rows

T = 16


@pytest.fixture
def batches() -> Batches:
    rows = Rows.of(random_rows(40, T, seed=1))
    return Batches(rows, batch_size=8, seed=0, shuffle=True, max_length=T, packing="best_fit")


@pytest.mark.parametrize("start", [0, 3, 10**6])
def test_what_is_fed_is_every_batch_from_the_start_on(batches, start):
    mesh = make_mesh(MeshConfig(data=2, fsdp=4))
    with closing(feed(batches, batches.indices, mesh, start=start, microbatches=2)) as iterator:
        for n in range(start, start + 9):
            assert iterator.get_state() == {"next_index": n}
            batch = next(iterator)
            for name, expected in batches[n].items():
                assert batch[name].shape == (2, 4, T)
                np.testing.assert_array_equal(np.asarray(batch[name]).reshape(8, T), expected)


def test_it_ends_with_the_indices(batches):
    mesh = make_mesh(MeshConfig())
    with closing(feed(batches, once(batches), mesh)) as iterator:
        assert len(list(iterator)) == len(batches.all_indices())


def test_batches_are_made_while_a_step_runs_and_no_further_than_a_few(batches, monkeypatch):
    made = []
    take = batches.take

    def slow(indices):
        time.sleep(0.1)
        made.append(threading.current_thread())
        return take(indices)

    monkeypatch.setattr(batches, "take", slow)
    mesh = make_mesh(MeshConfig(tensor=8, fsdp=1))  # whose devices share their lines
    with closing(feed(batches, batches.indices, mesh)) as iterator:
        next(iterator)
        waited = 0.0
        for _ in range(8):
            time.sleep(0.25)  # the step
            begin = time.perf_counter()
            next(iterator)
            waited += time.perf_counter() - begin
        assert waited < 0.4  # of 0.8 and more without threads
        time.sleep(0.5)
        assert len(made) <= 9 + 4
    assert threading.main_thread() not in made


def test_what_goes_wrong_in_a_thread_is_raised_where_the_batch_is_asked_for(batches, monkeypatch):
    def broken(indices):
        raise OSError("the disk is gone")

    monkeypatch.setattr(batches, "take", broken)
    with (
        closing(feed(batches, batches.indices, make_mesh(MeshConfig()))) as iterator,
        pytest.raises(OSError, match="the disk is gone"),
    ):
        next(iterator)
