"""What is wrong with a run is said before a weight is loaded, in the words of its file."""

from __future__ import annotations

import dataclasses

import pytest
from rich.console import Console
from run_fixtures import write_run

from droplora_jax.core.config import MeshConfig
from droplora_jax.core.errors import InputError
from droplora_jax.core.sharding import make_mesh
from droplora_jax.data.config import DataConfig
from droplora_jax.hf import source
from droplora_jax.runs import config_reader
from droplora_jax.runs.config import BaseConfig, RunConfig
from droplora_jax.runs.preparation import check_mesh, prepare
from droplora_jax.training import checkpoint
from droplora_jax.training.config import TrainConfig


def run_of(train: TrainConfig, length: int = 32) -> RunConfig:
    data = DataConfig("a.jsonl", max_length=length)
    return RunConfig(model=BaseConfig("base"), output="out", data=data, train=train)


@pytest.mark.parametrize(
    ("train", "message"),
    [
        (TrainConfig(global_batch=12), r"train\.global_batch=12 .* the 8 parts .* multiple of 8"),
        (TrainConfig(global_batch=16, micro_batch=4), r"train\.micro_batch=4 .* the 8 parts"),
    ],
)
def test_rows_that_the_mesh_can_not_split(train, message):
    with pytest.raises(InputError, match=message):
        check_mesh(run_of(train), make_mesh(MeshConfig(data=2, fsdp=4)))
    check_mesh(run_of(train, 33), make_mesh(MeshConfig(data=2, fsdp=2, tensor=2)))


def test_positions_that_the_mesh_can_not_split():
    message = r"data.max_length=40 .*by 16, the square of mesh.context=4"
    with pytest.raises(InputError, match=message):
        check_mesh(run_of(TrainConfig(), 40), make_mesh(MeshConfig(fsdp=2, context=4)))


@pytest.mark.parametrize(
    ("sections", "message"),
    [
        ({"optim": {"name": "adamv"}}, r"optim\.name='adamv': .*; did you mean adam\?"),
        ({"optim": {"warmup_steps": 13}}, r"optim\.warmup_steps=13: must be below .* 12 steps"),
        ({"optim": {"no_decay": ["magnitud$"]}}, r"optim\.no_decay='magnitud\$' matches nothing"),
        ({"adapter": {"targets": ["q_prj$"]}}, r"q_prj"),
        (
            {"adapter": {"drop_schedule": "linear", "drop_warmup_steps": 12}},
            r"adapter\.drop_warmup_steps=12: must be below",
        ),
        ({"mesh": {"fsdp": 3}}, r"mesh .*fsdp"),
        ({"data": {"max_length": 256}}, r"data\.max_length=256: the model is made for 128"),
        ({"model": {"path": "/nowhere/at/all"}}, r"model\.path='/nowhere/at/all'"),
        ({"model": {"attention": "cudnn"}}, r"model\.attention='cudnn'"),
    ],
)
def test_a_mistake_is_named_by_its_key_before_anything_is_loaded(
    base, tmp_path, monkeypatch, sections, message
):
    monkeypatch.setattr("droplora_jax.hf.base.Base.load", None)
    config = config_reader.read(write_run(base, tmp_path, **sections))
    with pytest.raises(InputError, match=message):
        prepare(config, Console(quiet=True))
    assert not (tmp_path / "run").exists()


def test_config_and_checkpoints_are_read_once_and_the_base_is_opened_once(
    base, tmp_path, monkeypatch
):
    config = config_reader.read(write_run(base, tmp_path))
    opened: list[str] = []

    def count(name, owner, attribute):
        original = getattr(owner, attribute)

        def counted(*arguments, **named):
            opened.append(name)
            return original(*arguments, **named)

        monkeypatch.setattr(owner, attribute, counted)

    (tmp_path / "run" / "checkpoints").mkdir(parents=True)
    (tmp_path / "run" / "config.yaml").write_text(config_reader.dump(config))
    count("config", config_reader, "read")
    count("base", source, "resolve")
    count("checkpoints", checkpoint.ocp, "CheckpointManager")
    prepared = prepare(config, Console(quiet=True))
    assert sorted(opened) == ["base", "checkpoints", "config"]
    assert (prepared.saved_steps, prepared.steps) == (0, 12)
    assert dataclasses.asdict(prepared.config) == dataclasses.asdict(config)
