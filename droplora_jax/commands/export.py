"""From the folder of a run, or of an adapter, to folders for other tools: `droplora export`."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import jax
from rich.console import Console

from droplora_jax.adapters import truncate
from droplora_jax.core import files
from droplora_jax.core.console import say
from droplora_jax.core.errors import InputError
from droplora_jax.core.sharding import make_mesh
from droplora_jax.hf import merged
from droplora_jax.hf.peft import adapter
from droplora_jax.hf.peft.config import PEFT_FILE
from droplora_jax.models.decoder import Decoder
from droplora_jax.runs import config_reader
from droplora_jax.runs.config import BaseConfig
from droplora_jax.runs.folder import CONFIG_FILE
from droplora_jax.runs.open_base import open_base
from droplora_jax.runs.open_model import base_of, load_adapters, restored, weights_of


def export_folder(
    folders: Sequence[str],
    target: Path,
    *,
    format: str,
    step: str,
    dtype: str | None,
    rank: int | None,
    base: str | None,
    console: Console,
) -> None:
    """Write what a run trained, or adapters in PEFT's format, as a folder for other tools.

    Args:
      folders: of one run; or of adapters, DIR or DIR=WEIGHT, whose sum it is.
      format: a name in `EXPORTERS`.
      step: of a run: `last`, `best`, or the number of a checkpoint.
      dtype: of a merged folder; default: the base's.
      rank: what to truncate the adapter to; default: its own.
      base: of an adapter, if it is not where the adapter says.
    """
    files.check_free(target)
    if dtype is not None and format != "merged":
        raise InputError(f"--dtype {dtype}: only for --format merged; adapters are float32")
    weights = weights_of(folders)
    first = next(iter(weights))
    if list(weights.values()) == [1.0] and not (first / PEFT_FILE).exists():
        model, extra = _restored(first, step)
    else:
        model, extra = _with_adapters(weights, base), None
    if rank is not None:
        model, truncation = truncate.truncated(model, rank)
        say(console, str(truncation))
    if format == "merged":
        say(console, str(merged.save_merged(model, target, dtype=dtype)))
    else:
        limits = adapter.save_adapter(model, target, extra=extra)
        say(console, f"{target}: adapter in PEFT's format{_for_vllm(limits)}")


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
    config = config_reader.read(folder / CONFIG_FILE)
    return restored(_abstract(config.model), config, folder, which)


def _with_adapters(adapters: Mapping[Path, float], base: str | None) -> Decoder:
    """The model of adapters in PEFT's format, the base as shapes only."""
    config, *others = (base_of(folder, base) for folder in adapters)
    first, *folders = adapters
    for folder, other in zip(folders, others, strict=True):
        if other != config:
            raise InputError(
                f"{folder} is for the base {other.path}, {first} for {config.path}: only adapters "
                "of one base have a sum; if it is one under two names, say --base"
            )
    try:
        model = _abstract(config)
    except InputError as error:
        raise InputError(f"{error} (the base of {first}; another place: --base)") from error
    return load_adapters(model, adapters)


def _abstract(config: BaseConfig) -> Decoder:
    """A base as shapes only, on one device."""
    return open_base(config).abstract(make_mesh(devices=jax.devices()[:1]), dtype="float32")
