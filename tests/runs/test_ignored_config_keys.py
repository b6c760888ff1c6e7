"""Keys of `config.json` that a user knows to change nothing go with all that is made of a base."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
from oracles import with_config
from run_fixtures import write_run
from small_models import load

import droplora_jax as dl
from droplora_jax.core.errors import InputError
from droplora_jax.runs.open_model import find_model

KEYS = ("house_mark", "hidden_mark")


@pytest.fixture
def marked(base: Path, tmp_path: Path) -> Path:
    return with_config(base, tmp_path / "marked", house_mark="x", hidden_mark=[1])


def test_an_adapter_and_a_merge_carry_them(marked, tmp_path, droplora):
    config = dl.DropLoRA(rank=2, targets="q_proj")
    base = load(marked, ignore_config_keys=KEYS)
    model = dl.inject(base, config, key=dl.root_key(0))
    dl.save_adapter(model, tmp_path / "adapter")
    dl.save_merged(model, tmp_path / "merged")
    for name in ("adapter", "merged"):
        assert find_model(str(tmp_path / name)).base.source.ignored_config_keys == KEYS
        assert droplora.good("inspect", tmp_path / name)
    droplora.good("export", tmp_path / "adapter", "--to", tmp_path / "again", "--format", "merged")
    report = json.loads((tmp_path / "again" / "droplora_merge.json").read_text())
    assert report["ignored_config_keys"] == list(KEYS)


def test_every_command_names_its_own_way_to_ignore_them(marked, tmp_path, droplora):
    said = droplora("inspect", marked)
    assert said.code == 2
    assert "'house_mark' ('x'), 'hidden_mark' ([1])" in said.err.replace("\n", " ")
    assert "--ignore-config-keys house_mark hidden_mark" in said.err.replace("\n", " ")
    assert droplora.good("inspect", marked, "--ignore-config-keys", *KEYS)

    run = write_run(marked, tmp_path)
    said = droplora("train", run, "--dry-run")
    assert said.code == 2
    override = "model.ignore_config_keys=[house_mark,hidden_mark]"
    assert override in said.err.replace("\n", " ")
    assert droplora.good("train", run, "--dry-run", override)

    with pytest.raises(InputError, match=r'ignore_config_keys=\["house_mark", "hidden_mark"\]'):
        dl.open_model(str(marked))
    assert find_model(str(marked), ignore_config_keys=KEYS).base
