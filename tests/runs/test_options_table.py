"""The table of options is made from the dataclasses, and the guide has the current one."""

from __future__ import annotations

import dataclasses
import typing
from pathlib import Path

import droplora_jax.runs
from droplora_jax.runs.config import RunConfig
from droplora_jax.runs.options_table import BEGIN, END, options, table

GUIDE = Path(droplora_jax.runs.__file__).with_name("README.md")


def test_the_guide_has_the_current_table():
    """`python -m droplora_jax.runs.options_table` prints it."""
    _, _, rest = GUIDE.read_text(encoding="utf-8").partition(BEGIN)
    shown, end, _ = rest.partition(END)
    assert end
    assert shown.strip() == table().strip()


def test_every_key_is_in_it_once_with_its_meaning():
    listed = list(options())
    keys = [option.key for option in listed]
    assert len(keys) == len(set(keys))
    assert all(option.values and option.meaning for option in listed)
    hints = typing.get_type_hints(RunConfig)
    for section in ("model", "data", "optim", "train", "mesh", "distributed"):
        names = [f"{section}.{field.name}" for field in dataclasses.fields(hints[section])]
        assert [key for key in keys if key.startswith(f"{section}.")] == names
    assert {"output", "seed", "adapter.rank", "adapter.drop_rate"} <= set(keys)


def test_values_and_defaults_are_those_of_the_file():
    by_key = {option.key: option for option in options()}
    assert by_key["model.dtype"].values == "`auto`, `bfloat16`, `float32`"
    assert by_key["optim.learning_rate"].default == "0.0003"
    assert by_key["adapter.rescale"].default == "true"
    assert by_key["train.eval_tasks"].default == "{}"
    assert by_key["model.path"].default == ""
