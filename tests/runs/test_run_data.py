"""The data of a run."""

from __future__ import annotations

import pytest
from data_fixtures import random_rows

from droplora_jax.data.batches import Batches
from droplora_jax.runs.run_data import total_steps
from droplora_jax.training.config import TrainConfig


@pytest.mark.parametrize(
    ("config", "steps"),
    [
        (TrainConfig(global_batch=4), 8),  # three epochs of ten rows
        (TrainConfig(global_batch=4, epochs=0.5), 2),
        (TrainConfig(global_batch=4, steps=7), 7),
    ],
)
def test_how_long(config, steps):
    batches = Batches(random_rows(10, 8, 0), batch_size=4, seed=0, shuffle=True, max_length=8)
    assert total_steps(config, batches) == steps
