"""From a run's configuration to its folder: train it, and export what it trained."""

from __future__ import annotations

import shlex
import time
from collections.abc import Mapping
from dataclasses import fields, replace
from functools import partial
from pathlib import Path
from typing import Any

import jax
from jax.sharding import Mesh
from rich.console import Console

from droplora_jax.adapters.config import LowRank
from droplora_jax.adapters.droplora import DropLoRA
from droplora_jax.adapters.surgery import inject, split
from droplora_jax.core import distributed, files, prng
from droplora_jax.core.console import say
from droplora_jax.core.errors import InputError
from droplora_jax.core.sharding import described, make_mesh
from droplora_jax.hf.base import Base
from droplora_jax.hf.peft.adapter import adapter_config, load_adapter, save_adapter
from droplora_jax.models.decoder import Decoder, with_noise
from droplora_jax.nn.quantized_kernel import Quantized, leaves
from droplora_jax.runs import config_reader, memory, run_data
from droplora_jax.runs.compile import attention_kernel, program, step_options
from droplora_jax.runs.config import BaseConfig, RunConfig
from droplora_jax.runs.folder import ADAPTER, CHECKPOINTS, CONFIG_FILE, check_folder, last_step
from droplora_jax.runs.open_base import open_base
from droplora_jax.runs.preparation import check_mesh
from droplora_jax.runs.run_data import total_steps
from droplora_jax.training import optimizer
from droplora_jax.training.compiled_step import in_background
from droplora_jax.training.loop import Run, train


def train_run(config: RunConfig, console: Console) -> Path:
    """Train what `config` describes, from its newest checkpoint if there is one.

    Everything that can be wrong with the input is looked at before the weights are loaded, and
    nothing is written before everything is loaded. Returns the folder of the adapter.
    """
    began = time.perf_counter()
    folder = Path(config.output)
    adapter = folder / ADAPTER
    config, base, mesh, (batches, evaluation, record) = _checked(config, folder, console)
    steps = total_steps(config.train, batches)
    schedule = optimizer.learning_rate(config.optim, steps)
    if adapter.exists() and last_step(folder) >= steps:
        say(console, f"finished already: {_after(folder)}")
        return adapter
    # From shapes, in a thread that touches no device, while the weights come.
    compiled = in_background(partial(program, config, base, mesh, steps, memory.limit(mesh)))
    loading = time.perf_counter()
    prepared = Run(
        model=_load(config, base, mesh),
        compiled=compiled,
        mesh=mesh,
        train=batches,
        evaluation=evaluation,
        tx=optimizer.optimizer(config.optim, schedule),
        schedule=schedule,
        steps=steps,
        config=config.train,
        seed=config.seed,
        folder=folder,
        record=record,
        console=console,
        began=began,
        weights_seconds=time.perf_counter() - loading,
        options=step_options(config),
    )
    say(console, _describe(prepared))
    _begin(folder, config)
    model = train(prepared)
    save_adapter(model, adapter, extra=what_to_record(record), replace=True)
    say(console, f"done: {_after(folder)}")
    return adapter


def dry_run(config: RunConfig, console: Console) -> None:
    """Look at everything that a run looks at before it loads the weights, and show its data."""
    _checked(config, Path(config.output), console)
    say(console, "a dry run: no weights were loaded, and there is no run yet")


def _checked(
    config: RunConfig, folder: Path, console: Console
) -> tuple[RunConfig, Base, Mesh, run_data.Read]:
    """The input of a run, looked at and read."""
    config, base = _resolved(config, folder)
    check_folder(config, folder)
    mesh = make_mesh(config.mesh)
    check_mesh(config, mesh)
    attention_kernel(config, base, mesh, mesh.devices.flat[0].platform)
    read = _read_data(config, base, console)
    run_data.check_same(folder / CHECKPOINTS, read.record["data"])
    steps = total_steps(config.train, read.train)
    optimizer.learning_rate(config.optim, steps)
    config.adapter.share(steps)
    return config, base, mesh, read


def _begin(folder: Path, config: RunConfig) -> None:
    """Make the run's folder, which every process has to see."""
    distributed.wait_for_all("the folder was looked at")
    file, text = folder / CONFIG_FILE, config_reader.dump(config)
    if distributed.first():
        folder.mkdir(parents=True, exist_ok=True)
        files.write_file(file, text)
    distributed.wait_for_all("the folder is there")
    if not distributed.first() and not file.exists():
        raise InputError(
            f"output={str(folder)!r}: {distributed.name()} does not find there what process 0 has "
            "written; it must be on a file system that all processes share"
        )


def _resolved(config: RunConfig, folder: Path) -> tuple[RunConfig, Base]:
    """The configuration with what its sources say, and the base.

    They say the commit of a hub id, and the shape of the adapter that training starts from.
    """
    file, model = folder / CONFIG_FILE, config.model
    before = _model_before(file)
    if before and before.path == model.path and model.revision is None:
        # The run goes on with the commit that it began with.
        model = replace(model, revision=before.revision)
    base = open_base(model)
    model = replace(model, revision=base.source.revision or model.revision)
    config = replace(config, model=model)
    if model.adapter is None:
        return config, base
    theirs = adapter_config(base.shape, Path(model.adapter))
    return replace(config, adapter=_started(config.adapter, theirs, model.adapter)), base


def _model_before(file: Path) -> BaseConfig | None:
    """The model of the run that is there; `check_folder` speaks of a file that can't be read."""
    try:
        return config_reader.read(file).model if file.exists() else None
    except InputError:
        return None


def _started(own: LowRank, theirs: LowRank, where: str) -> Any:
    """The adapter that is there, trained on as the run says."""
    for option in fields(own):
        name, value = option.name, getattr(own, option.name)
        there = getattr(theirs, name, "no such option")
        free = name in theirs.of_training
        if not free and value not in (getattr(DropLoRA(), name), there):
            raise InputError(
                f"adapter.{name}={value!r}: the adapter in model.adapter={where!r} has "
                f"{there!r}; leave the key out"
            )
    given = {name: getattr(own, name) for name in theirs.of_training if hasattr(own, name)}
    return replace(theirs, **given)


def _read_data(config: RunConfig, base: Base, console: Console) -> run_data.Read:
    if config.data.max_length > base.shape.max_positions:
        raise InputError(
            f"data.max_length={config.data.max_length}: the model is made for "
            f"{base.shape.max_positions} positions (max_position_embeddings in its config.json)"
        )
    return run_data.read(config, base.tokenizer, base.shape.vocab_size, console)


def _load(config: RunConfig, base: Base, mesh: Mesh) -> Decoder:
    """The base on the mesh, with fresh adapters or those of `model.adapter`."""
    model = base.load(
        mesh,
        dtype=config.model.jax_dtype(mesh.devices.flat[0].platform),
        quantization=config.model.quantization(),
    )
    model = with_noise(model, config.train.neftune_alpha)
    if config.model.adapter is None:
        return with_fresh_adapters(config, model)
    return load_adapter(model, config.model.adapter, config=config.adapter)


def with_fresh_adapters(config: RunConfig, model: Decoder) -> Decoder:
    """The model with the adapters that a run begins with."""
    init_key = prng.run_keys(config.seed).init
    return inject(model, config.adapter, key=init_key)


def what_to_record(record: Mapping[str, Any]) -> dict[str, Any]:
    """What `droplora_config.json` says beside the adapter's own options."""
    return {"template": record["template"], "seed": record["config"]["seed"]}


def _describe(prepared: Run) -> str:
    _, adapters, _, frozen = split(prepared.model)
    trained, kept = (sum(x.size for x in leaves(t)) for t in (adapters, frozen))
    kinds = sorted({x.kind for x in leaves(frozen) if isinstance(x, Quantized)})
    base = f"base in {', '.join(kinds)}; " if kinds else ""
    device = prepared.mesh.devices.flat[0]
    mesh = f" as {described(prepared.mesh.shape)}" if prepared.mesh.size > 1 else ""
    joined = f" in {jax.process_count()} processes" if distributed.several() else ""
    kernel = prepared.model.attention_kernel(prepared.options)
    return (
        f"{trained:,} of {trained + kept:,} parameters trained ({trained / (trained + kept):.2%}); "
        f"{base}{prepared.mesh.size} x {device.device_kind}{mesh}{joined}; "
        f"attention {kernel}; {prepared.steps} steps"
    )


def _after(folder: Path) -> str:
    quoted, merged = shlex.quote(str(folder)), shlex.quote(f"{folder}-merged")
    return (
        f"the adapter is in {folder / ADAPTER}\n"
        f"a plain model for any tool: droplora export {quoted} --to {merged} --format merged"
    )
