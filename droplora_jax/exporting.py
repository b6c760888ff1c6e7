"""From the folder of a run, or of an adapter, to folders for other tools: `droplora export`."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import jax
from rich.console import Console

from droplora_jax import display, export, files, hub, run
from droplora_jax.errors import InputError
from droplora_jax.export.peft_config import PEFT_FILE
from droplora_jax.launch import CONFIG_FILE
from droplora_jax.models import Decoder
from droplora_jax.opening import base_of, restored
from droplora_jax.sharding import make_mesh


def export_folder(
    folder: Path,
    target: Path,
    *,
    format: str,
    step: str,
    dtype: str | None,
    rank: int | None,
    base: str | None,
    console: Console,
) -> None:
    """Write what a run trained, or an adapter in PEFT's format, as a folder for other tools.

    Args:
      folder: of the run, or of the adapter.
      format: a name in `EXPORTERS`.
      step: of a run: `last`, `best`, or the number of a checkpoint.
      dtype: of a merged folder; default: the base's.
      rank: what to truncate the adapter to; default: its own.
      base: of an adapter, if it is not where the adapter says.
    """
    files.check_free(target)
    if dtype is not None and format != "merged":
        raise InputError(f"--dtype {dtype}: only for --format merged; adapters are float32")
    if (folder / PEFT_FILE).exists():
        model, extra = _with_adapter(folder, base), None
    else:
        model, extra = _restored(folder, step)
    if rank is not None:
        model, truncation = export.truncated(model, rank)
        display.say(console, str(truncation))
    if format == "merged":
        display.say(console, str(export.save_merged(model, target, dtype=dtype)))
    else:
        limits = export.save_adapter(model, target, extra=extra)
        display.say(console, f"{target}: adapter in PEFT's format{_for_vllm(limits)}")


def _for_vllm(limits: Sequence[str]) -> str:
    return (
        f"\nvLLM does not serve it as an adapter: it has {', '.join(limits)}. --format merged is "
        "for every tool"
        if limits
        else ""
    )


def _restored(folder: Path, which: str) -> tuple[Decoder, dict[str, Any] | None]:
    """A run's model with the adapters of a checkpoint, the base as shapes only; what to record."""
    if not (folder / CONFIG_FILE).exists():
        raise InputError(
            f"{folder}: no run of droplora in it (no {CONFIG_FILE}), "
            f"and no adapter (no {PEFT_FILE})"
        )
    config = run.read(folder / CONFIG_FILE)
    return restored(_abstract(config.model), config, folder, which)


def _with_adapter(folder: Path, base: str | None) -> Decoder:
    """The model of an adapter in PEFT's format, the base as shapes only."""
    config = base_of(folder, base)
    try:
        model = _abstract(config)
    except InputError as error:
        raise InputError(f"{error} (the base of {folder}; another place: --base)") from error
    return export.load_adapter(model, folder)


def _abstract(config: run.LoadConfig) -> Decoder:
    """A base as shapes only, on one device."""
    base = hub.resolve(config.path, config.revision)
    _, shape = hub.read_config(base, config.ignore_config_keys)
    source = hub.source(config.path, config.revision)
    mesh = make_mesh(devices=jax.devices()[:1])
    return hub.abstract_model(shape, mesh=mesh, dtype="float32", source=source)
