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

from droplora_jax import display, export, files, hub, memory, optim, prng, processes, reading, run
from droplora_jax.adapters import DropLoRA, LowRank
from droplora_jax.checkpoint import Checkpoints
from droplora_jax.compiling import program
from droplora_jax.errors import InputError
from droplora_jax.models import Decoder, with_noise
from droplora_jax.program import in_background
from droplora_jax.quantized import Quantized, leaves
from droplora_jax.sharding import described, make_mesh
from droplora_jax.surgery import inject, split
from droplora_jax.tokenizer import load_tokenizer
from droplora_jax.train import Run, total_steps, train

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


def train_run(config: run.RunConfig, console: Console) -> Path:
    """Train what `config` describes, from its newest checkpoint if there is one.

    Everything that can be wrong with the input is looked at before the weights are loaded, and
    nothing is written before everything is loaded. Returns the folder of the adapter.
    """
    began = time.perf_counter()
    folder = Path(config.output)
    adapter = folder / ADAPTER
    config, mesh, (batches, measured, record) = _checked(config, folder, console)
    steps = total_steps(config.train, batches)
    if adapter.exists() and _last_step(folder) >= steps:
        display.say(console, f"finished already: {_after(folder)}")
        return adapter
    # From shapes, in a thread that touches no device, while the weights come.
    compiled = in_background(partial(program, config, mesh, steps, memory.limit(mesh)))
    loading = time.perf_counter()
    prepared = Run(
        model=_load(config, mesh),
        program=compiled,
        mesh=mesh,
        train=batches,
        measured=measured,
        optim=config.optim,
        config=config.train,
        seed=config.seed,
        folder=folder,
        record=record,
        console=console,
        began=began,
        weights_seconds=time.perf_counter() - loading,
    )
    display.say(console, _describe(prepared))
    _begin(folder, config)
    model = train(prepared)
    export.save_adapter(model, adapter, extra=what_to_record(record), replace=True)
    display.say(console, f"done: {_after(folder)}")
    return adapter


def dry_run(config: run.RunConfig, console: Console) -> None:
    """Look at everything that a run looks at before it loads the weights, and show its data."""
    _checked(config, Path(config.output), console)
    display.say(console, "a dry run: no weights were loaded, and there is no run yet")


def _checked(
    config: run.RunConfig, folder: Path, console: Console
) -> tuple[run.RunConfig, Mesh, reading.Read]:
    """The input of a run, looked at and read."""
    config = _resolved(config, folder)
    check_folder(config, folder)
    mesh = make_mesh(config.mesh)
    config.train.check_mesh(mesh, config.data.max_length)
    read = _read_data(config, console)
    reading.check_same(folder / CHECKPOINTS, read.record["data"])
    steps = total_steps(config.train, read.train)
    optim.learning_rate(config.optim, steps)
    config.adapter.share(steps)
    return config, mesh, read


def _begin(folder: Path, config: run.RunConfig) -> None:
    """Make the run's folder, which every process has to see."""
    processes.wait_for_all("the folder was looked at")
    file, text = folder / CONFIG_FILE, run.dump(config)
    if processes.first():
        folder.mkdir(parents=True, exist_ok=True)
        files.write_file(file, text)
    processes.wait_for_all("the folder is there")
    if not processes.first() and not file.exists():
        raise InputError(
            f"output={str(folder)!r}: {processes.name()} does not find there what process 0 has "
            "written; it must be on a file system that all processes share"
        )


def _resolved(config: run.RunConfig, folder: Path) -> run.RunConfig:
    """The configuration with what its sources say: the commit of a hub id, the adapter's shape."""
    file, model = folder / CONFIG_FILE, config.model
    before = _model_before(file)
    if before and before.path == model.path and model.revision is None:
        revision = before.revision  # the run goes on with the commit that it began with
    else:
        revision = hub.pinned_revision(model.path, model.revision)
    config = replace(config, model=replace(model, revision=revision))
    if model.adapter is None:
        return config
    base = hub.resolve(model.path, revision)
    _, shape = hub.read_config(base, model.ignore_config_keys)
    theirs = export.adapter_config(shape, Path(model.adapter))
    return replace(config, adapter=_started(config.adapter, theirs, model.adapter))


def _model_before(file: Path) -> run.LoadConfig | None:
    """The model of the run that is there; `check_folder` speaks of a file that can't be read."""
    try:
        return run.read(file).model if file.exists() else None
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


def check_folder(config: run.RunConfig, folder: Path) -> None:
    """Raise InputError if the folder holds something that is not this run.

    A run with other settings but without a checkpoint may start over.
    """
    file = folder / CONFIG_FILE
    if folder.exists() and not file.exists():
        files.check_free(folder, ignore=[files.temporary_file(file)])
    if file.exists():
        try:
            old = run.read(file)
        except InputError as error:
            raise InputError(
                f"{folder}: holds a {CONFIG_FILE} that is not a run's ({error}); nothing is "
                "overwritten. Name another output"
            ) from error
        changed = changed_keys(run.as_tree(config), run.as_tree(old))
        if changed and _last_step(folder):
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


def _last_step(folder: Path) -> int:
    checkpoints = folder / CHECKPOINTS
    return Checkpoints(checkpoints, read_only=True).latest or 0 if checkpoints.is_dir() else 0


def _read_data(config: run.RunConfig, console: Console) -> reading.Read:
    base = hub.resolve(config.model.path, config.model.revision)
    _, shape = hub.read_config(base, config.model.ignore_config_keys)
    if config.data.max_length > shape.max_positions:
        raise InputError(
            f"data.max_length={config.data.max_length}: the model is made for "
            f"{shape.max_positions} positions (max_position_embeddings in its config.json)"
        )
    return reading.read(config, load_tokenizer(base), shape.vocab_size, console)


def _load(config: run.RunConfig, mesh: Mesh) -> Decoder:
    """The base on the mesh, with fresh adapters or those of `model.adapter`."""
    model = hub.load(
        config.model.path,
        mesh=mesh,
        dtype=config.model.jax_dtype(mesh.devices.flat[0].platform),
        remat="nothing" if config.train.remat == "auto" else config.train.remat,
        attention=config.model.attention,
        revision=config.model.revision,
        ignore_config_keys=config.model.ignore_config_keys,
        quantize=config.model.quantization(),
    )
    model = with_noise(model, config.train.neftune_alpha)
    if config.model.adapter is None:
        return with_fresh_adapters(config, model)
    return export.load_adapter(model, config.model.adapter, config=config.adapter)


def with_fresh_adapters(config: run.RunConfig, model: Decoder) -> Decoder:
    """The model with the adapters that a run begins with."""
    init_key = prng.fold_name(prng.root_key(config.seed), "init")
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
    joined = f" in {jax.process_count()} processes" if processes.several() else ""
    kernel = prepared.model.attention_kernel(packed=prepared.train.packed)
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
