"""A run: prepared, compiled while its weights are read, trained, and its adapter written."""

from __future__ import annotations

import shlex
import time
from functools import partial
from pathlib import Path

import jax
from rich.console import Console

from droplora_jax.adapters.surgery import inject, split
from droplora_jax.core import distributed, files, prng
from droplora_jax.core.console import say
from droplora_jax.core.errors import InputError
from droplora_jax.core.sharding import described
from droplora_jax.hf.peft.adapter import load_adapter, save_adapter
from droplora_jax.models.decoder import Decoder, with_noise
from droplora_jax.nn.quantized_kernel import Quantized, leaves
from droplora_jax.runs import config_reader, memory
from droplora_jax.runs.compile import compile_step, step_options
from droplora_jax.runs.config import RunConfig
from droplora_jax.runs.folder import ADAPTER, CONFIG_FILE, adapter_record
from droplora_jax.runs.preparation import Prepared, prepare
from droplora_jax.training.compiled_step import in_background
from droplora_jax.training.loop import Run, train


def train_run(config: RunConfig, console: Console) -> Path:
    """Train what `config` describes, from its newest checkpoint if there is one.

    Everything that can be wrong with the input is checked before the weights are loaded, and
    nothing is written before everything is loaded. Returns the folder of the adapter.
    """
    began = time.perf_counter()
    prepared = prepare(config, console)
    adapter = prepared.folder / ADAPTER
    if adapter.exists() and prepared.saved_steps >= prepared.steps:
        say(console, f"finished already: {_after(prepared.folder)}")
        return adapter
    run = _loaded(prepared, console, began)
    say(console, _describe(run))
    _begin(prepared)
    model = train(run)
    save_adapter(model, adapter, extra=adapter_record(run.record), replace=True)
    say(console, f"done: {_after(prepared.folder)}")
    return adapter


def dry_run(config: RunConfig, console: Console) -> None:
    """Check everything that a run checks before it loads the weights, and show its data."""
    prepare(config, console)
    say(console, "a dry run: no weights were loaded, and there is no run yet")


def _loaded(prepared: Prepared, console: Console, began: float) -> Run:
    """The run with its weights; its step is still being compiled, in a thread."""
    config, mesh = prepared.config, prepared.mesh
    platform, limit = mesh.devices.flat[0].platform, memory.limit(mesh)
    compiled = in_background(partial(compile_step, prepared.step, config, platform, limit))
    loading = time.perf_counter()
    return Run(
        model=load_model(prepared),
        compiled=compiled,
        mesh=mesh,
        train=prepared.data.train,
        evaluation=prepared.data.evaluation,
        options=step_options(config),
        optim=prepared.step.optim,
        steps=prepared.steps,
        config=config.train,
        seed=config.seed,
        folder=prepared.folder,
        record=prepared.data.record,
        console=console,
        began=began,
        weights_seconds=time.perf_counter() - loading,
    )


def load_model(prepared: Prepared) -> Decoder:
    """The base on the mesh, with fresh adapters or those of `model.adapter`."""
    config, mesh = prepared.config, prepared.mesh
    model = prepared.base.load(
        mesh,
        dtype=config.model.dtype_on(mesh.devices.flat[0].platform),
        quantization=config.model.quantization(),
    )
    model = with_noise(model, config.train.neftune_alpha)
    if config.model.adapter is None:
        return inject(model, config.adapter, key=prng.run_keys(config.seed).init)
    return load_adapter(model, config.model.adapter, config=config.adapter)


def _begin(prepared: Prepared) -> None:
    """Make the run's folder, which every process has to see."""
    distributed.wait_for_all("the folder was looked at")
    folder, text = prepared.folder, config_reader.dump(prepared.config)
    file = folder / CONFIG_FILE
    if distributed.first():
        folder.mkdir(parents=True, exist_ok=True)
        files.write_file(file, text)
    distributed.wait_for_all("the folder is there")
    if not distributed.first() and not file.exists():
        raise InputError(
            f"output={str(folder)!r}: {distributed.name()} does not find there what process 0 has "
            "written; it must be on a file system that all processes share"
        )


def _describe(run: Run) -> str:
    _, adapters, _, frozen = split(run.model)
    trained, kept = (sum(x.size for x in leaves(t)) for t in (adapters, frozen))
    kinds = sorted({x.kind for x in leaves(frozen) if isinstance(x, Quantized)})
    base = f"base in {', '.join(kinds)}; " if kinds else ""
    device = run.mesh.devices.flat[0]
    mesh = f" as {described(run.mesh.shape)}" if run.mesh.size > 1 else ""
    processes = f" in {jax.process_count()} processes" if distributed.several() else ""
    kernel = run.model.attention_kernel(run.options)
    return (
        f"{trained:,} of {trained + kept:,} parameters trained ({trained / (trained + kept):.2%}); "
        f"{base}{run.mesh.size} x {device.device_kind}{mesh}{processes}; "
        f"attention {kernel}; {run.steps} steps"
    )


def _after(folder: Path) -> str:
    quoted, merged = shlex.quote(str(folder)), shlex.quote(f"{folder}-merged")
    return (
        f"the adapter is in {folder / ADAPTER}\n"
        f"a plain model for any tool: droplora export {quoted} --to {merged} --format merged"
    )
