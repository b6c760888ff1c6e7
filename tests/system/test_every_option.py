"""Every value of every key of a run's YAML is trained, and planned, by the command line."""

from __future__ import annotations

import dataclasses
import json
import math
import types
import typing
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import pytest
from option_table import COMMON, REFUSED, RUNS, write_files
from run_fixtures import CommandLine, metrics, write_yaml

from droplora_jax.adapters import ADAPTERS
from droplora_jax.data.config import AUTO, BAD_ROWS, EMPTY, TOO_LONG, Part
from droplora_jax.data.formats import FORMATS
from droplora_jax.data.templates import TEMPLATES
from droplora_jax.data.templates.base import TRAIN_ON
from droplora_jax.inference.tasks import TASKS
from droplora_jax.runs import config_reader
from droplora_jax.runs.config import RunConfig
from droplora_jax.training.optimizer import optimizer_names

# Keys that are any text, path or pattern: one value does.
FREE = {
    "Part.columns.*",
    "Part.format",
    "Part.path",
    "Part.template",
    "adapter.targets",
    "data.cache",
    "data.columns.*",
    "data.ignore_keys",
    "data.train",
    "data.valid",
    "distributed.coordinator",
    "model.adapter",
    "model.path",
    "model.revision",
    "optim.options.*",
    "output",
    "train.best",
    "train.eval_tasks.*",
}

# Keys of text whose values have names, and those names.
NAMED: dict[str, Sequence[str]] = {
    "adapter.targets": ("paper", "all-linear"),
    "data.bad_rows": BAD_ROWS,
    "data.empty": EMPTY,
    "data.format": (AUTO, *FORMATS),
    "data.template": (AUTO, *TEMPLATES),
    "data.too_long": TOO_LONG,
    "data.train_on": TRAIN_ON,
    "optim.name": optimizer_names(),
    "train.eval_tasks": tuple(TASKS),
}

# Keys that are numbers: the least that they may be, and others that often differ.
NUMBERS: dict[str, Sequence[float]] = {
    "Part.weight": (),
    "adapter.alpha": (),
    "adapter.alpha_pattern.*": (),
    "adapter.drop_rate": (0.0, 0.5),
    "adapter.drop_rate_pattern.*": (0.0,),
    "adapter.drop_warmup_steps": (0, 1),
    "adapter.input_dropout": (0.0,),
    "adapter.rank": (1, 3, 4),
    "adapter.rank_pattern.*": (2,),
    "data.max_length": (2, 24),
    "data.valid_fraction": (),
    "distributed.num_processes": (1,),
    "distributed.process_id": (0,),
    "distributed.timeout": (10,),
    "mesh.context": (-1, 1, 2),
    "mesh.data": (-1, 1, 2),
    "mesh.fsdp": (-1, 1, 2),
    "mesh.replica": (-1, 1, 2),
    "mesh.tensor": (-1, 1, 2),
    "model.quantize_tile": (2,),
    "optim.b_ratio": (1.0,),
    "optim.clip_norm": (),
    "optim.learning_rate": (),
    "optim.options.*": (),
    "optim.warmup_steps": (0, 1),
    "optim.weight_decay": (0.0,),
    "seed": (0, 2**32 - 1),
    "train.epochs": (1.5,),
    "train.eval_every": (1,),
    "train.eval_examples": (1,),
    "train.global_batch": (1,),
    "train.keep": (1,),
    "train.log_every": (1,),
    "train.micro_batch": (1,),
    "train.neftune_alpha": (0.0,),
    "train.save_every": (1,),
    "train.steps": (1,),
    "train.stop_seconds": (1,),
}


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    made = tmp_path_factory.mktemp("options")
    write_files(made)
    return made


@pytest.fixture
def droplora(folder, monkeypatch, capsys) -> CommandLine:
    monkeypatch.chdir(folder)
    return CommandLine(capsys)


@pytest.mark.parametrize("name", RUNS)
def test_a_run_is_planned_and_trained(name, droplora):
    file = write_yaml(Path(f"{name}.yaml"), tree(name, RUNS[name]))
    planned = json.loads(droplora.good("plan", file, "--topology", "cpu:8", "--json"))
    assert planned["flops_per_step"] > 0
    droplora.good("train", file)
    output = Path("runs", name)
    config = config_reader.read(file).train
    logged = [row for row in metrics(output) if "loss" in row]
    last = config.steps or logged[-1]["step"]
    due = [n for n in range(1, last + 1) if n % config.log_every == 0 or n == last]
    assert [row["step"] for row in logged] == due
    numbers = [value for row in metrics(output) for value in row.values()]
    assert all(math.isfinite(number) for number in numbers if isinstance(number, int | float))
    assert (output / "adapter" / "adapter_model.safetensors").stat().st_size > 0


@pytest.mark.parametrize("why", REFUSED)
def test_what_cannot_be_trained_is_refused(why, droplora):
    changes, key, can_be_planned = REFUSED[why]
    file = write_yaml(Path("refused.yaml"), tree("refused", changes))
    plan = ("plan", file, "--topology", "cpu:8", "--json")
    refusals = [droplora("train", file)]
    if can_be_planned:
        droplora.good(*plan)
    else:
        refusals.append(droplora(*plan))
    for result in refusals:
        assert result.code == 2
        assert key in result.err
        assert "Traceback" not in result.err
    assert not Path("runs", "refused").exists()


def tree(name: str, changes: Mapping[str, Any]) -> dict[str, Any]:
    """A run's YAML from dotted keys."""
    nested: dict[str, Any] = {"output": f"runs/{name}"}
    for key, value in {**COMMON, **changes}.items():
        *sections, last = key.split(".")
        section = nested
        for part in sections:
            section = section.setdefault(part, {})
        if value is not ...:
            section[last] = value
    return nested


# Whether the table is complete.


def test_every_key_and_every_value_occurs(droplora):
    seen: dict[str, list[Any]] = {}
    for name, changes in RUNS.items():
        config = config_reader.read(write_yaml(Path("read.yaml"), tree(name, changes)))
        for key, value in values_of(config):
            seen.setdefault(key, []).append(value)
    for changes, _, _ in REFUSED.values():
        for key, value in changes.items():
            seen.setdefault(key, []).append(value)
    missing = [
        f"{key}: {what}"
        for key, hint in keys_of(RunConfig)
        for what in missing_of(key, hint, seen.get(key, []))
    ]
    assert not missing, "no row of option_table has\n" + "\n".join(missing)


def values_of(config: Any, prefix: str = "") -> Iterator[tuple[str, Any]]:
    """Every key of a configuration with its value; of a mapping each value under `key.*` too."""
    for field in dataclasses.fields(config):
        key, value = prefix + field.name, getattr(config, field.name)
        inner = value if isinstance(value, tuple) else (value,)
        for section in filter(dataclasses.is_dataclass, inner):
            yield from values_of(section, start_of(key, type(section)))
        if isinstance(value, Mapping):
            yield from ((f"{key}.*", each) for each in value.values())
        yield key, value


def keys_of(cls: type[Any], prefix: str = "") -> Iterator[tuple[str, Any]]:
    """Every key that a configuration may have, with its type."""
    hints = typing.get_type_hints(cls)
    for field in dataclasses.fields(cls):
        key, alternatives = prefix + field.name, list(alternatives_of(hints[field.name]))
        inner = [leaf for each in alternatives for leaf in (each, *elements_of(each))]
        for section in filter(dataclasses.is_dataclass, inner):
            yield from keys_of(section, start_of(key, section))
        for each in alternatives:
            if typing.get_origin(each) in (dict, Mapping):
                yield from ((f"{key}.*", leaf) for leaf in elements_of(each))
            if not dataclasses.is_dataclass(each):
                yield key, each


def start_of(key: str, section: type[Any]) -> str:
    """What the keys of a section begin with: kinds of adapters apart, sources of data alike."""
    kinds = {cls: f"{key}.{kind}." for kind, cls in ADAPTERS.items()}
    return "Part." if section is Part else kinds.get(section, f"{key}.")


def alternatives_of(hint: Any) -> Iterator[Any]:
    """The types of a union."""
    if typing.get_origin(hint) in (typing.Union, types.UnionType):
        for each in typing.get_args(hint):
            yield from alternatives_of(each)
    else:
        yield hint


def elements_of(hint: Any) -> list[Any]:
    """The types of a tuple's elements or of a mapping's values."""
    if typing.get_origin(hint) is typing.Literal or not typing.get_args(hint):
        return []
    (*_, last) = (each for each in typing.get_args(hint) if each is not ...)
    return list(alternatives_of(last))


def missing_of(key: str, hint: Any, seen: Sequence[Any]) -> Iterator[str]:
    """What of one of a key's types no run has."""
    key = ".".join(part for part in key.split(".") if part not in ADAPTERS)
    origin = typing.get_origin(hint) or hint
    if origin is typing.Literal:
        yield from (repr(value) for value in typing.get_args(hint) if value not in seen)
    elif hint is bool:
        yield from (str(value) for value in (True, False) if not any(s is value for s in seen))
    elif hint is type(None):
        yield from ["null"] if None not in seen else []
    elif hint in (int, float):
        numbers = {value for value in seen if type(value) in (int, float)}
        if key not in NUMBERS:
            yield "a number with no entry in NUMBERS"
        yield from (str(value) for value in NUMBERS.get(key, ()) if value not in numbers)
        yield from (
            ["a second value"]
            if len({*numbers, *(() if None not in seen else (None,))}) < 2
            else []
        )
    elif hint is str:
        if key not in FREE and key not in NAMED:
            yield "a text that is neither in FREE nor in NAMED"
        yield from (repr(name) for name in NAMED.get(key, ()) if name not in seen)
        yield from ["any text"] if not any(isinstance(value, str) for value in seen) else []
    elif issubclass(origin, (tuple, Mapping)):
        filled = [value for value in seen if isinstance(value, (tuple, Mapping)) and value]
        yield from ["one with something in it"] if not filled else []
        if issubclass(origin, Mapping):
            names = {name for value in filled if isinstance(value, Mapping) for name in value}
            yield from (repr(name) for name in NAMED.get(key, ()) if name not in names)
    else:
        yield f"a rule for the type {hint}"
