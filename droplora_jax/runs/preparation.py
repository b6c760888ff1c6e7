"""Everything of a run that is checked and built before a weight is loaded."""

from __future__ import annotations

import re
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, fields, replace
from pathlib import Path

from jax.sharding import Mesh
from rich.console import Console

from droplora_jax.adapters.config import LowRank
from droplora_jax.adapters.droplora import DropLoRA
from droplora_jax.core.console import say
from droplora_jax.core.errors import InputError
from droplora_jax.core.sharding import RULES, axis_size, make_mesh
from droplora_jax.hf.base import Base
from droplora_jax.hf.peft.adapter import adapter_config
from droplora_jax.runs import run_data
from droplora_jax.runs.compile import AbstractStep, abstract_step, attention_kernel
from droplora_jax.runs.config import RunConfig
from droplora_jax.runs.folder import check_settings, previous_config, progress
from droplora_jax.runs.open_base import open_base
from droplora_jax.runs.run_data import RunData
from droplora_jax.runs.schedule_change import schedule_changes
from droplora_jax.runs.special_tokens import check_added_tokens, check_special_tokens
from droplora_jax.training import optimizer


@dataclass(frozen=True)
class Prepared:
    """A run that can start: its input is read and right, and no weight is loaded.

    Attributes:
      config: with the commit of the base, and the shape of the adapter that training starts from.
      folder: of the run, which may not exist yet.
      step: from shapes alone, with the optimizer.
      steps: of the whole run.
      saved_steps: of its newest checkpoint; 0 without one.
    """

    config: RunConfig
    folder: Path
    base: Base
    mesh: Mesh
    data: RunData
    step: AbstractStep
    steps: int
    saved_steps: int


def prepare(config: RunConfig, console: Console) -> Prepared:
    """Check and read the input of a run, and show its data; nothing is written.

    Raises:
      InputError: whatever is wrong with the configuration, the folder, the base's configuration,
        the devices, the data, the optimizer or the adapter, in the words of the run's file.
    """
    folder = Path(config.output)
    previous = previous_config(folder)
    config, base = _resolved(config, previous)
    saved = progress(folder)
    if previous is not None and saved.step:
        check_settings(config, previous, folder)
    with _in_section("mesh", config):
        mesh = make_mesh(config.mesh)
    check_mesh(config, mesh)
    attention_kernel(config, base, mesh)
    with _in_section("optim", config):
        optimizer.check(config.optim)  # before data is tokenised, which may take long
    data = run_data.read(config, base, console)
    run_data.check_same(saved.record, data.record["data"], folder)
    steps = run_data.total_steps(config.train, data.train)
    step = prepared_step(config, base, mesh, steps)
    if saved.record is not None:
        before = run_data.steps_before(saved.record, config.train, data.train)
        for change in schedule_changes(config, saved.step, before, steps):
            say(console, change)
    if not (saved.step or config.model.adapter):  # else nothing but a new run would help
        targets, trained = config.adapter.targets, step.trained_modules
        check_added_tokens(base, trained, targets)
        for warning in check_special_tokens(data.used_tokens, base, trained, targets):
            say(console, warning)
    return Prepared(config, folder, base, mesh, data, step, steps, saved.step)


def prepared_step(config: RunConfig, base: Base, mesh: Mesh, steps: int) -> AbstractStep:
    """The step of a run of `steps` steps, from shapes alone, with its optimizer.

    Raises:
      InputError: see `prepare`, of what does not depend on the data.
    """
    check_mesh(config, mesh)
    attention_kernel(config, base, mesh)
    with _in_section("optim", config):
        optim = optimizer.build(config.optim, steps)
    with _in_section("adapter", config):
        share = config.adapter.share(steps)
    with _in_section("adapter", config), _in_section("optim", config):
        return abstract_step(config, base, mesh, optim, share)


def check_mesh(config: RunConfig, mesh: Mesh) -> None:
    """Raise InputError unless every device of the mesh gets equal parts of a batch.

    And for `remat=offload` on a CPU, which has nowhere to offload to.
    """
    train, length = config.train, config.data.max_length
    if train.remat == "offload" and mesh.devices.flat[0].platform == "cpu":
        raise InputError(
            "train.remat='offload': a CPU has no memory beside the host's; take 'dots', or an "
            "accelerator"
        )
    parts = axis_size(mesh, RULES["batch"] or ())
    if train.rows_per_pass % parts:
        name = "micro_batch" if train.micro_batch else "global_batch"
        raise InputError(
            f"train.{name}={train.rows_per_pass} is not divisible by the {parts} parts that the "
            f"mesh splits rows into (replica x data x fsdp); make it a multiple of {parts}, or "
            "change the mesh"
        )
    if length % (parts := mesh.shape["context"] ** 2):
        raise InputError(
            f"data.max_length={length} is not divisible by {parts}, the square of "
            f"mesh.context={mesh.shape['context']} (each of so many devices attends with a "
            f"part of every other's positions); make it a multiple of {parts}"
        )


def _resolved(config: RunConfig, previous: RunConfig | None) -> tuple[RunConfig, Base]:
    """The configuration, completed from its sources, and the base.

    The sources say the commit of a hub id, and the shape of the adapter that training starts from.
    """
    model = config.model
    if previous and previous.model.path == model.path and model.revision is None:
        # The run goes on with the commit that it began with.
        model = replace(model, revision=previous.model.revision)
    base = open_base(model)
    model = replace(model, revision=base.source.revision or model.revision)
    config = replace(config, model=model)
    if model.adapter is None:
        return config, base
    saved = adapter_config(base.shape, Path(model.adapter))
    return replace(config, adapter=_continued(config.adapter, saved, model.adapter)), base


def _continued(given: LowRank, saved: LowRank, path: str) -> LowRank:
    """The saved adapter's configuration, with the run's options of training.

    Raises:
      InputError: the run gives another option, which the saved adapter does not have.
    """
    for field in fields(given):
        name, value = field.name, getattr(given, field.name)
        saved_value = getattr(saved, name, "no such option")
        unset = getattr(DropLoRA(), name)
        if name not in saved.of_training and value not in (unset, saved_value):
            raise InputError(
                f"adapter.{name}={value!r}: the adapter in model.adapter={path!r} has "
                f"{saved_value!r}; leave the key out"
            )
    training = {name: getattr(given, name) for name in saved.of_training if hasattr(given, name)}
    return replace(saved, **training)


@contextmanager
def _in_section(name: str, config: RunConfig) -> Iterator[None]:
    """Name the fields of a section, which an error in the block begins with, by the file's keys."""
    try:
        yield
    except InputError as error:
        section = getattr(config, name)
        begins_with_field = re.compile("|".join(rf"{field.name}\b" for field in fields(section)))
        raise InputError(
            *(f"{name}.{p}" if begins_with_field.match(p) else p for p in error.problems)
        ) from error
