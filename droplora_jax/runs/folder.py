"""A run's folder: the names of its files, and what may change when a run goes on."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from droplora_jax.core import files
from droplora_jax.core.errors import InputError
from droplora_jax.runs import config_reader
from droplora_jax.runs.config import RunConfig
from droplora_jax.training.checkpoint import Checkpoints

CONFIG_FILE = "config.yaml"


CHECKPOINTS = "checkpoints"


ADAPTER = "adapter"


# What may change when a run carries on: how long, how often to look, and on which devices.
MAY_CHANGE = (
    "output",
    "mesh",
    "distributed",
    "model.attention",
    "data.cache",
    "train.steps",
    "train.epochs",
    "train.eval_every",
    "train.save_every",
    "train.log_every",
    "train.keep",
    "train.stop_seconds",
    "train.micro_batch",
    "train.remat",
    "train.profile_steps",
)


def check_folder(config: RunConfig, folder: Path) -> None:
    """Raise InputError if the folder holds something that is not this run.

    A run with other settings but without a checkpoint may start over.
    """
    file = folder / CONFIG_FILE
    if folder.exists() and not file.exists():
        files.check_free(folder, ignore=files.temporary_files(file))
    if file.exists():
        try:
            old = config_reader.read(file)
        except InputError as error:
            raise InputError(
                f"{folder}: holds a {CONFIG_FILE} that is not a run's ({error}); nothing is "
                "overwritten. Name another output"
            ) from error
        changed = changed_keys(config_reader.as_tree(config), config_reader.as_tree(old))
        if changed and last_step(folder):
            raise InputError(
                f"{folder} holds a run with other settings: {'; '.join(changed)}. Put them back to "
                "carry on (steps, cadences and the mesh may change), or name another output"
            )


def changed_keys(new: Any, old: Any, path: str = "") -> list[str]:
    """The keys whose values differ, as `key: old -> new`, except those that may change."""
    if path in MAY_CHANGE:
        return []
    if isinstance(new, dict) and isinstance(old, dict):
        below = {key: f"{path}.{key}" if path else key for key in sorted(new.keys() | old.keys())}
        return [
            change
            for key, where in below.items()
            for change in changed_keys(new.get(key), old.get(key), where)
        ]
    return [] if new == old else [f"{path}: {old!r} -> {new!r}"]


def last_step(folder: Path) -> int:
    checkpoints = folder / CHECKPOINTS
    return Checkpoints(checkpoints, read_only=True).latest or 0 if checkpoints.is_dir() else 0
