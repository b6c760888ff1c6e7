"""A run's folder: the names of its files, and what may change when a run goes on."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any, NamedTuple

from droplora_jax.core import files
from droplora_jax.core.errors import InputError
from droplora_jax.data.end_markers import RECORD_KEY
from droplora_jax.hf.peft.folder import record_of_quantization
from droplora_jax.nn.options import Quantization
from droplora_jax.runs import config_reader
from droplora_jax.runs.config import RunConfig
from droplora_jax.training.checkpoint import Checkpoints, Record

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


class Progress(NamedTuple):
    """How far a run came: the steps of its newest checkpoint, and the record in it."""

    step: int = 0
    record: Record | None = None


def progress(folder: Path) -> Progress:
    """How far the run in a folder came; nothing in it is touched."""
    if not (folder / CHECKPOINTS).is_dir():
        return Progress()
    with Checkpoints(folder / CHECKPOINTS, read_only=True) as checkpoints:
        return Progress(checkpoints.latest or 0, checkpoints.newest_record())


def previous_config(folder: Path) -> RunConfig | None:
    """The configuration of the run in a folder; None if there is no run, nor anything else.

    Raises:
      InputError: the folder holds something that is not a run.
    """
    file = folder / CONFIG_FILE
    if not file.exists():
        if folder.exists():
            files.check_free(folder, ignore=files.temporary_files(file))
        return None
    try:
        return config_reader.read(file)
    except InputError as error:
        raise InputError(
            f"{folder}: holds a {CONFIG_FILE} that is not a run's ({error}); nothing is "
            "overwritten. Name another output"
        ) from error


def check_settings(config: RunConfig, previous: RunConfig, folder: Path) -> None:
    """Raise InputError if the run in a folder, which has a checkpoint, has other settings."""
    changed = changed_keys(config_reader.as_tree(config), config_reader.as_tree(previous))
    if changed:
        raise InputError(
            f"{folder} holds a run with other settings: {'; '.join(changed)}. Put them back to "
            "carry on (steps, cadences and the mesh may change), or name another output"
        )


def changed_keys(new: object, old: object, path: str = "") -> list[str]:
    """The keys whose values differ, as `key: old -> new`, except those that may change."""
    if path in MAY_CHANGE:
        return []
    if isinstance(new, dict) and isinstance(old, dict):
        below = {key: f"{path}.{key}" if path else key for key in sorted(new.keys() | old.keys())}
        return [
            change
            for key, key_path in below.items()
            for change in changed_keys(new.get(key), old.get(key), key_path)
        ]
    return [] if new == old else [f"{path}: {old!r} -> {new!r}"]


def adapter_record(record: Mapping[str, Any]) -> dict[str, Any]:
    """What `droplora_config.json` says beside the adapter's own options."""
    model = record["config"]["model"]
    quantization = Quantization(
        model["quantize"], model["quantize_tile"], model["quantize_pattern"]
    )
    return {
        **{key: record[key] for key in ("template", RECORD_KEY) if key in record},
        "seed": record["config"]["seed"],
        **record_of_quantization(quantization),
    }
