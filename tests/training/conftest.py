"""A run that is trained once and copied."""

from __future__ import annotations

import shutil
from pathlib import Path

import pytest
from run_fixtures import write_run

from droplora_jax import cli

STEPS = 40
LONG = {"train": {"steps": STEPS, "save_every": 5, "eval_every": 20}}


@pytest.fixture(scope="session")
def finished(base, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The folder of a run and its YAML, trained to the end; not to be changed."""
    folder = tmp_path_factory.mktemp("finished")
    assert cli.main(["train", str(write_run(base, folder, **LONG))]) == 0
    return folder


@pytest.fixture
def copy(finished, base, tmp_path) -> Path:
    """The same as if it had been trained here."""
    shutil.copytree(finished / "run", tmp_path / "run")
    file = tmp_path / "run" / "config.yaml"
    file.write_text(file.read_text().replace(str(finished), str(tmp_path)))
    write_run(base, tmp_path, **LONG)
    return tmp_path
