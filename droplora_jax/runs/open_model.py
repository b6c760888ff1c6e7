"""A trained model from where it lies: a base, a merged folder, a run, an adapter."""

from __future__ import annotations

import hashlib
import json
import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from functools import reduce
from operator import or_
from pathlib import Path
from typing import Any, Literal

import jax
import jax.numpy as jnp
from flax import nnx
from jax.sharding import Mesh

from droplora_jax.adapters.combine import combine
from droplora_jax.adapters.surgery import initial_of, inject, split
from droplora_jax.core.config import MeshConfig
from droplora_jax.core.errors import InputError
from droplora_jax.core.files import read_json
from droplora_jax.core.sharding import make_mesh
from droplora_jax.data.end_markers import RECORD_KEY, EndMarkers
from droplora_jax.hf.base import Base
from droplora_jax.hf.peft.adapter import load_adapter
from droplora_jax.hf.peft.config import PEFT_FILE
from droplora_jax.hf.peft.folder import (
    OWN_FILE,
    adapter_notes,
    check_adapter,
    ignored_config_keys,
)
from droplora_jax.models.config import ModelConfig
from droplora_jax.models.decoder import Decoder
from droplora_jax.models.families.config_keys import UnfitConfigKeys
from droplora_jax.nn.options import QuantizedKind
from droplora_jax.runs import config_reader
from droplora_jax.runs.config import BaseConfig, RunConfig
from droplora_jax.runs.folder import ADAPTER, CHECKPOINTS, CONFIG_FILE, adapter_record
from droplora_jax.runs.open_base import open_base
from droplora_jax.training.checkpoint import Checkpoints
from droplora_jax.training.step import TrainState

Dtype = Literal["auto", "bfloat16", "float32"]

# The files of a model, an adapter or a run on which its completions depend.
MARKS = (
    "*.safetensors",
    "config.json",
    "generation_config.json",
    "tokenizer*",
    "*.jinja",
    "*.model",
    PEFT_FILE,
    OWN_FILE,
    CONFIG_FILE,
    f"{ADAPTER}/*",
    f"{CHECKPOINTS}/*",
)


@dataclass(frozen=True)
class Opened:
    """A model to use.

    Attributes:
      template: that its training data was written with, where that is recorded with its adapter;
        of several adapters, where it is one.
      end_markers: what ends its answers, as recorded with its adapters.
    """

    model: Decoder
    tokenizer: Any
    template: str | None = None
    end_markers: EndMarkers = EndMarkers()


@dataclass(frozen=True)
class ModelFiles:
    """A model that was found and not loaded: its base, and what was trained beside it.

    Attributes:
      folder: what was named: a base, a run, or an adapter in PEFT's format.
      config: the base, as the command line, the run or the adapter names it.
      base: the same, opened.
      adapters: folders in PEFT's format, with their weights.
      run: whose checkpoint has the adapters, if no folder has them.
      step: which checkpoint of it.
    """

    folder: Path
    config: BaseConfig
    base: Base
    adapters: Mapping[Path, float] = field(default_factory=dict)
    run: RunConfig | None = None
    step: str = "last"

    def fingerprint(self) -> str:
        """Changes with the files of the model and its adapters: their names, sizes and times."""
        marks = [
            (str(file.relative_to(folder)), file.stat().st_size, file.stat().st_mtime_ns)
            for folder in dict.fromkeys([self.folder, *self.adapters])
            if not (folder != self.folder and folder.is_relative_to(self.folder))  # in its marks
            for file in sorted({file for mark in MARKS for file in folder.glob(mark)})
        ]
        return hashlib.sha256(json.dumps(marks).encode()).hexdigest()[:16]

    def load(
        self,
        *,
        dtype: Dtype = "auto",
        mesh: Mesh | None = None,
        quantize: QuantizedKind | None = None,
    ) -> Opened:
        """The model with its weights; the arguments are those of `open_model`."""
        config = self.config if quantize is None else replace(self.config, quantize=quantize)
        tokenizer = self.base.tokenizer
        mesh = mesh or decoding_mesh(self.base.shape)
        model = self.base.load(
            mesh,
            dtype=replace(config, dtype=dtype).dtype_on(mesh.devices.flat[0].platform),
            quantization=config.quantization(),
        )
        if self.run is not None:
            model, record = restored(model, self.run, self.folder, self.step)
            return Opened(model, tokenizer, record["template"], end_markers_of(record))
        if not self.adapters:
            return Opened(model, tokenizer)
        records = [adapter_notes(folder) for folder in self.adapters]
        templates = {record.get("template") for record in records}
        return Opened(
            load_adapters(model, self.adapters),
            tokenizer,
            templates.pop() if len(templates) == 1 else None,
            end_markers_of(*records),
        )


def open_model(
    path: str,
    adapter: str | Sequence[str] = (),
    *,
    dtype: Dtype = "auto",
    mesh: Mesh | None = None,
    revision: str | None = None,
    step: str = "last",
    ignore_config_keys: Sequence[str] = (),
    quantize: QuantizedKind | None = None,
) -> Opened:
    """Open a model with its tokenizer.

    Args:
      path: a Hugging Face folder (a base, or a merged one), its URL, a hub id; the folder of a run;
        or of an adapter in PEFT's format, which says itself what base it is for.
      adapter: for a base, the folder of an adapter in PEFT's format; or of several, whose sum it
        is, each as it is or with a weight: DIR=WEIGHT.
      dtype: `auto` is bfloat16 on accelerators, float32 on CPU.
      mesh: where it goes; default: all local devices, as many as can along `tensor`.
      revision: branch, tag or commit of a hub id.
      step: of a run: `last`, `best`, or the number of a checkpoint.
      ignore_config_keys: keys of `config.json` known to change nothing, besides those that are
        recorded with a run, an adapter or a merged folder.
      quantize: how the linear layers are stored; default: as a run was trained, else `none`.

    Raises:
      InputError: a folder that is none of these, or a part of it that is missing or broken.

    >>> import droplora_jax as dl
    >>> from droplora_jax.commands.quickstart import BASE  # a small model in the package
    >>> opened = dl.open_model(str(BASE))
    >>> generator = dl.Generator(opened.model, opened.tokenizer)
    >>> len(generator(["Is 7 odd"], dl.Sampling(max_new_tokens=2)))
    1
    """
    files = find_model(
        path, adapter, revision=revision, step=step, ignore_config_keys=ignore_config_keys
    )
    return files.load(dtype=dtype, mesh=mesh, quantize=quantize)


def find_model(
    path: str,
    adapter: str | Sequence[str] = (),
    *,
    revision: str | None = None,
    step: str = "last",
    ignore_config_keys: Sequence[str] = (),
) -> ModelFiles:
    """Find a model and open its base, without its weights; the arguments are `open_model`'s.

    Raises:
      InputError: a folder that is none of these, or a part of it that is missing or broken.
    """
    try:
        return _find_model(path, adapter, revision, step, tuple(ignore_config_keys))
    except UnfitConfigKeys as error:
        raise error.said_as(f"ignore_config_keys={json.dumps(error.keys)}") from error


def _find_model(
    path: str,
    adapter: str | Sequence[str],
    revision: str | None,
    step: str,
    ignored: tuple[str, ...],
) -> ModelFiles:
    folder = Path(path).expanduser()
    trained = next((f for f in (CONFIG_FILE, PEFT_FILE) if (folder / f).exists()), None)
    adapters = (adapter,) if isinstance(adapter, str) else adapter
    if trained is not None and adapters:
        raise InputError(
            f"{path}: has an adapter of its own, so it takes no other ({adapters[0]}); name its "
            "base, and every adapter"
        )
    if step != "last" and trained != CONFIG_FILE:
        raise InputError(f"step {step}: only a run has several, and {path} is none")
    if trained == CONFIG_FILE:
        run = config_reader.read(folder / CONFIG_FILE)
        config = ignoring(run.model, ignored)
        if step == "last" and _only_adapter(folder):
            # The run's adapter holds all of that one, and the rows of added tokens.
            config = replace(config, adapter=None, add_tokens=())
            return _with_adapters(folder, config, {folder / ADAPTER: 1.0})
        return ModelFiles(folder, config, open_base(config), run=run, step=step)
    if trained == PEFT_FILE:
        config = ignoring(base_of(folder), ignored)
        return _with_adapters(folder, config, {folder: 1.0})
    config = ignoring(BaseConfig(path, revision=revision), ignored)
    return _with_adapters(None, config, weights_of(adapters))


def _with_adapters(
    folder: Path | None, config: BaseConfig, weights: Mapping[Path, float]
) -> ModelFiles:
    """A base with adapters; `folder` is what was named, if it is not the base."""
    base = open_base(config)
    return ModelFiles(folder or base.folder, config, base.under([*weights]), weights)


def ignoring(config: BaseConfig, keys: Sequence[str]) -> BaseConfig:
    """A base of whose `config.json` further keys are ignored."""
    keys = tuple(dict.fromkeys((*config.ignore_config_keys, *keys)))
    return replace(config, ignore_config_keys=keys)


def weights_of(adapters: Sequence[str]) -> dict[Path, float]:
    """The folders of adapters that are each named DIR or DIR=WEIGHT, with their weights.

    Raises:
      InputError: a weight that is none, or a folder named twice.
    """
    weights: dict[Path, float] = {}
    for word in adapters:
        folder, equals, weight = word.rpartition("=")
        if not equals or Path(word).expanduser().is_dir():
            folder, weight = word, "1"
        try:
            value = float(weight)
        except ValueError:
            raise InputError(
                f"{word}: no such folder, and no DIR=WEIGHT, whose weight is a number"
            ) from None
        if (path := Path(folder).expanduser()) in weights:
            raise InputError(f"{word}: {folder} is named twice; give it one weight")
        weights[path] = value
    return weights


def load_adapters(model: Decoder, adapters: Mapping[Path, float]) -> Decoder:
    """The base with an adapter from its folder, or with the weighted sum of several."""
    loaded = {str(folder): load_adapter(model, folder) for folder in adapters}
    if list(adapters.values()) == [1.0]:
        return loaded.popitem()[1]
    return combine(loaded, {str(folder): weight for folder, weight in adapters.items()})


def _only_adapter(run: Path) -> bool:
    """Whether the checkpoints of a run that is done were taken away."""
    return not (run / CHECKPOINTS).is_dir() and (run / ADAPTER).is_dir()


def restored(
    model: Decoder, config: RunConfig, folder: Path, which: str
) -> tuple[Decoder, dict[str, Any]]:
    """The base of a run with the adapters of a checkpoint, and what to record of it."""
    if not (folder / CHECKPOINTS).is_dir():
        raise InputError(f"{folder}: no complete checkpoint in it; train it first")
    model = inject(model, config.adapter, key="later")
    graphdef, adapters, mask_keys, frozen = split(model)
    like = TrainState(
        jnp.zeros((), jnp.int32), adapters, opt_state=None, initial=initial_of(frozen)
    )
    with Checkpoints(folder / CHECKPOINTS, read_only=True) as checkpoints:
        step = checkpoints.choose(which)
        state, record = checkpoints.restore(step, like), checkpoints.record(step)
    frozen = nnx.merge_state(frozen, state.initial)
    return nnx.merge(graphdef, state.adapters, mask_keys, frozen), adapter_record(record)


def base_of(adapter: Path, instead: str | None = None) -> BaseConfig:
    """The base that an adapter in PEFT's format is for, or the one to take instead."""
    check_adapter(adapter)
    named = read_json(adapter / PEFT_FILE)
    path = instead or named.get("base_model_name_or_path")
    if not path:
        raise InputError(f"{adapter}: does not say which base: give --base, or --adapter to a base")
    if Path(path).expanduser().resolve() == adapter.resolve():
        raise InputError(
            f"{adapter}: names itself as its base (base_model_name_or_path): if the model beside "
            "the adapter has it merged, it would count twice. Name the base, or copy the model's "
            "files to a folder of their own"
        )
    config = BaseConfig(path, revision=None if instead else named.get("revision"))
    return ignoring(config, ignored_config_keys(adapter))


def end_markers_of(*records: Mapping[str, Any]) -> EndMarkers:
    """The end markers that any of these records names."""
    return reduce(or_, (EndMarkers.of_record(r.get(RECORD_KEY)) for r in records), EndMarkers())


def decoding_mesh(shape: ModelConfig) -> Mesh:
    """All local devices, as many as the heads allow along `tensor`.

    A decoding step is short: weights that stay where they are beat weights that are gathered.
    """
    devices = jax.local_devices()
    tensor = math.gcd(len(devices), shape.kv_heads)
    return make_mesh(MeshConfig(tensor=tensor), devices)
