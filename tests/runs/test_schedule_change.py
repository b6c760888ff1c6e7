"""A run whose number of steps changes says what its schedules do."""

from __future__ import annotations

import re

import pytest

import droplora_jax as dl
from droplora_jax.data.config import DataConfig
from droplora_jax.runs.config import BaseConfig, RunConfig
from droplora_jax.runs.schedule_change import schedule_changes
from droplora_jax.training.config import OptimConfig


def changes(optim: OptimConfig, adapter: dl.DropLoRA, *steps: int) -> list[str]:
    config = RunConfig(
        model=BaseConfig("base"),
        output="out",
        data=DataConfig("a.jsonl"),
        optim=optim,
        adapter=adapter,
    )
    return list(schedule_changes(config, *steps))


LINEAR = OptimConfig(learning_rate=3e-2, warmup_steps=2, schedule="linear")
CONSTANT = OptimConfig(warmup_steps=2, schedule="constant")
SHRINKING = dl.DropLoRA(drop_schedule="linear")


@pytest.mark.parametrize(
    ("optim", "adapter", "steps", "says"),
    [
        (LINEAR, dl.DropLoRA(), (6, 6, 12), ["from 0.0075 at step 6 to 0.018 at step 7"]),
        (LINEAR, dl.DropLoRA(), (6, 12, 8), ["from 0.021 at step 6 to 0.01 at step 7"]),
        (CONSTANT, SHRINKING, (6, 6, 12), ["drop rates .* from 0.167 at step 6 to 0.5 at step 7"]),
        (LINEAR, SHRINKING, (6, 6, 12), ["learning rate", "drop rates"]),
        (LINEAR, SHRINKING, (6, 12, 12), []),
        (LINEAR, SHRINKING, (0, 6, 12), []),
        (LINEAR, SHRINKING, (12, 12, 6), []),
        (LINEAR, dl.DropLoRA(), (1, 6, 12), []),
        (CONSTANT, dl.DropLoRA(), (6, 6, 12), []),
    ],
    ids=range(9),
)
def test_both_values_are_named_where_they_differ(optim, adapter, steps, says):
    said = changes(optim, adapter, *steps)
    assert len(said) == len(says)
    for sentence, part in zip(said, says, strict=True):
        assert sentence.startswith("warning: ")
        assert re.search(part, sentence)
