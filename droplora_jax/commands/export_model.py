"""The model that `droplora export` writes: what a run or adapters trained, on an unread base."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import jax

from droplora_jax.core.errors import InputError
from droplora_jax.core.sharding import make_mesh
from droplora_jax.data.end_markers import RECORD_KEY
from droplora_jax.hf.base import Base
from droplora_jax.hf.peft.config import PEFT_FILE
from droplora_jax.hf.peft.folder import (
    adapter_notes,
    holds_model,
    named_adapters,
    record_of_quantization,
    trained_over,
)
from droplora_jax.models.decoder import Decoder
from droplora_jax.models.families.config_keys import UnfitConfigKeys
from droplora_jax.runs import config_reader
from droplora_jax.runs.folder import CONFIG_FILE
from droplora_jax.runs.open_base import open_base
from droplora_jax.runs.open_model import (
    base_of,
    end_markers_of,
    ignoring,
    load_adapters,
    restored,
    weights_of,
)


def exported_model(
    folders: Sequence[str],
    *,
    step: str = "last",
    base: str | None = None,
    ignore_config_keys: Sequence[str] = (),
) -> tuple[Decoder, dict[str, Any] | None]:
    """A model with trained adapters, its base as shapes only; and what to record with them.

    Args:
      folders: of one run; or of adapters, DIR or DIR=WEIGHT, whose sum it is.
      step: of a run: `last`, `best`, or the number of a checkpoint.
      base: of an adapter, if it is not where the adapter says.
      ignore_config_keys: keys of the base's `config.json` known to change nothing, besides those
        that are recorded.
    """
    weights = weights_of(folders)
    first = next(iter(weights))
    if list(weights.values()) == [1.0] and not (first / PEFT_FILE).exists():
        return _restored(first, step, ignore_config_keys)
    over = next(filter(None, map(trained_over, weights)), None)
    end_markers = end_markers_of(*map(adapter_notes, weights))
    record = {RECORD_KEY: end_markers.record()} if end_markers else {}
    return (
        _with_adapters(weights, base, ignore_config_keys),
        {**record_of_quantization(over), **record},
    )


def source_notes(folders: Sequence[str]) -> Iterator[str]:
    """What to know about the folders that are exported, in sentences."""
    for folder in weights_of(folders):
        if (folder / PEFT_FILE).exists() and holds_model(folder):
            yield (
                f"{folder} also holds a whole model: taken here is the adapter on its base. "
                "transformers puts the adapter onto the model beside it, so that it counts twice "
                "if it is merged there already: keep the two in folders of their own"
            )


def _restored(
    folder: Path, which: str, ignored: Sequence[str]
) -> tuple[Decoder, dict[str, Any] | None]:
    """A run's model with the adapters of a checkpoint, the base as shapes only; what to record."""
    if not (folder / CONFIG_FILE).exists():
        raise InputError(
            f"{folder}: no run of droplora in it (no {CONFIG_FILE}), "
            f"and no adapter (no {PEFT_FILE}){_below(folder)}"
        )
    config = config_reader.read(folder / CONFIG_FILE)
    base = open_base(ignoring(config.model, ignored))
    return restored(_abstract(base), config, folder, which)


def _below(folder: Path) -> str:
    """What to name instead of a folder with adapters in it, each in a folder of its own."""
    named = ", ".join(map(str, named_adapters(folder)))
    return f"; there are adapters in it, name one: {named}" if named else ""


def _with_adapters(
    adapters: Mapping[Path, float], base: str | None, ignored: Sequence[str]
) -> Decoder:
    """The model of adapters in PEFT's format, the base as shapes only."""
    config, *others = (base_of(folder, base) for folder in adapters)
    first, *folders = adapters
    for folder, other in zip(folders, others, strict=True):
        config = ignoring(config, other.ignore_config_keys)
        if (other.path, other.revision) != (config.path, config.revision):
            raise InputError(
                f"{folder} is for the base {other.path}, {first} for {config.path}: only adapters "
                "of one base have a sum; if it is one under two names, say --base"
            )
    try:
        opened = open_base(ignoring(config, ignored))
    except UnfitConfigKeys:
        raise  # it names the file, and the way out
    except InputError as error:
        raise InputError(f"{error} (the base of {first}; another place: --base)") from error
    return load_adapters(_abstract(opened.under([*adapters])), adapters)


def _abstract(base: Base) -> Decoder:
    """A base as shapes only, on one device."""
    return base.abstract(make_mesh(devices=jax.devices()[:1]), dtype="float32")
