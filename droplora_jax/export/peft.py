"""Adapters as a PEFT folder, out and in; what only this project knows is in a file of its own."""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import jax
import numpy as np
from flax import nnx
from safetensors.numpy import save_file

from droplora_jax import prng
from droplora_jax.adapters import ADAPTERS, DropLoRA
from droplora_jax.adapters.droplora import DropLoRALinear
from droplora_jax.errors import InputError
from droplora_jax.files import atomic_folder, read_json, write_json
from droplora_jax.models import FAMILIES, Decoder
from droplora_jax.surgery import adapters_of, inject, view
from droplora_jax.weights import TensorFiles, open_file

WEIGHTS_FILE = "adapter_model.safetensors"
PEFT_FILE = "adapter_config.json"
OWN_FILE = "droplora_config.json"
PREFIX = "base_model.model."

# Fields of adapter_config.json that are read, or that do not change what a loaded adapter computes.
READ = frozenset({"peft_type", "r", "lora_alpha"})
HARMLESS = frozenset(
    {
        "auto_mapping",
        "base_model_name_or_path",
        "corda_config",
        "ensure_weight_tying",
        "eva_config",
        "exclude_modules",
        "inference_mode",
        "layers_pattern",
        "loftq_config",
        "lora_dropout",
        "lora_ga_config",
        "megatron_config",
        "megatron_core",
        "peft_version",
        "qalora_group_size",
        "revision",
        "runtime_config",
        "target_modules",
        "task_type",
    }
)
# Any other field must say that its option is off, or have one of these values.
ACCEPTED: dict[str, tuple[Any, ...]] = {
    "peft_type": ("LORA",),
    "bias": ("none",),
    "init_lora_weights": (True, False, "gaussian", "orthogonal"),
}
OFF: tuple[Any, ...] = (None, False, [], {})


def save_adapter(
    model: Decoder,
    folder: str | Path,
    *,
    extra: Mapping[str, Any] | None = None,
    replace: bool = False,
) -> None:
    """Write the adapters as a PEFT folder, in float32.

    `droplora_config.json` keeps the adapter's own options, and `extra` (such as the template that
    the data was written with). The folder appears under its name only when complete, in place of
    an old one with `replace`.

    Raises:
      InputError: no adapters, an output folder that holds something, no space.
    """
    adapters = _adapters(model)
    config = next(iter(adapters.values())).config
    tensors = adapter_tensors(model)
    bad = [name for name, tensor in tensors.items() if not np.isfinite(tensor).all()]
    if bad:
        raise InputError(f"{bad[0]} is not finite ({len(bad)} tensors in all); nothing was written")
    source = model.source.path if model.source else ""
    with atomic_folder(Path(folder), replace=replace) as temporary:
        save_file(tensors, temporary / WEIGHTS_FILE, metadata={"format": "pt"})
        write_json(temporary / PEFT_FILE, _peft_config(config, tensors, source))
        own = {"format_version": 1, **dataclasses.asdict(config), **(extra or {})}
        write_json(temporary / OWN_FILE, own)


def adapter_tensors(model: Decoder) -> dict[str, np.ndarray]:
    """The factors by PEFT's names: lora_A [r, in] and lora_B [out, r] of every layer."""
    tensors: dict[str, np.ndarray] = {}
    for path, adapter in _adapters(model).items():
        a_LIR, b_LRO = (
            np.asarray(jax.device_get(p[...])) for p in (adapter.lora_a, adapter.lora_b)
        )
        for layer, (a_IR, b_RO) in enumerate(zip(a_LIR, b_LRO, strict=True)):
            key_a, key_b = _keys(model, path, layer)
            tensors[key_a] = np.ascontiguousarray(a_IR.T)
            tensors[key_b] = np.ascontiguousarray(b_RO.T)
    return tensors


def load_adapter(model: Decoder, folder: str | Path, *, config: DropLoRA | None = None) -> Decoder:
    """A view of `model` with the adapter of a PEFT folder.

    Args:
      model: without adapters, or with ones of the same rank and targets.
      folder: written by `save_adapter` or by PEFT (plain LoRA).
      config: how to train it on. By default its own options where `droplora_config.json` has
        them, else `drop_rate=0`: the LoRA that PEFT trained.

    Raises:
      InputError: a field that can't be represented, a tensor that is missing, of another shape
        (an adapter for another base) or not finite.
    """
    folder = Path(folder)
    peft = read_json(folder / PEFT_FILE)
    _check_fields(peft, folder / PEFT_FILE)
    tensors = open_file(folder / WEIGHTS_FILE)
    config = config or _own_config(folder, peft, list(tensors.files))
    injected = bool(adapters_of(model))
    model = view(model) if injected else inject(model, config, key=prng.root_key(0))
    expected: set[str] = set()
    for path, adapter in _adapters(model).items():
        _check_scale(peft, adapter.config, folder / PEFT_FILE)
        keys = [_keys(model, path, layer) for layer in range(model.config.layers)]
        expected.update(key for pair in keys for key in pair)
        of_a, of_b = zip(*keys, strict=True)
        adapter.lora_a = _filled(adapter.lora_a, tensors, of_a, folder)
        adapter.lora_b = _filled(adapter.lora_b, tensors, of_b, folder)
    if extra := set(tensors.files) - expected:
        raise InputError(
            f"{folder / WEIGHTS_FILE}: {sorted(extra)[0]} has no place in the model "
            f"({len(extra)} such tensors): the adapter's targets are not the model's"
        )
    return model


def _filled(
    parameter: nnx.LoRAParam, tensors: TensorFiles, names: tuple[str, ...], folder: Path
) -> Any:
    value = parameter.get_value()
    shape = value.shape[1:]
    for name in names:
        if name not in tensors.files:
            raise InputError(f"{folder / WEIGHTS_FILE}: lacks {name}")
        if tensors.shape(name) != shape[::-1]:
            raise InputError(
                f"{folder / WEIGHTS_FILE}: {name} has shape {list(tensors.shape(name))}, the model "
                f"needs {list(shape[::-1])}: the adapter was made for another base or rank"
            )
    stacked = np.stack([tensors.read(name).astype(np.float32).T for name in names])
    if not np.isfinite(stacked).all():
        raise InputError(f"{folder / WEIGHTS_FILE}: {names[0]} or a later layer is not finite")
    return parameter.replace(
        jax.make_array_from_callback(stacked.shape, value.sharding, lambda index: stacked[index])
    )


def _adapters(model: Decoder) -> dict[str, DropLoRALinear]:
    adapters = adapters_of(model)
    if not adapters:
        raise InputError("the model has no adapters: inject(model, DropLoRA(...), key=...) first")
    return adapters  # type: ignore[return-value]


def _keys(model: Decoder, path: str, layer: int) -> tuple[str, str]:
    name = FAMILIES[model.config.family].names[f"{path}.kernel"]
    module = PREFIX + name.module.format(layer=layer)
    return f"{module}.lora_A.weight", f"{module}.lora_B.weight"


def _peft_config(config: DropLoRA, tensors: Mapping[str, Any], source: str) -> dict[str, Any]:
    alpha = int(config.alpha) if float(config.alpha).is_integer() else config.alpha
    return {
        "peft_type": "LORA",
        "task_type": "CAUSAL_LM",
        "base_model_name_or_path": source,
        "r": config.rank,
        "lora_alpha": alpha,
        "target_modules": sorted({name.split(".")[-3] for name in tensors}),
        "lora_dropout": 0.0,
        "bias": "none",
        "fan_in_fan_out": False,
        "use_rslora": False,
        "use_dora": False,
        "inference_mode": True,
        "init_lora_weights": True,
    }


def _check_fields(peft: Mapping[str, Any], file: Path) -> None:
    for field in sorted(READ):
        if field not in peft:
            raise InputError(f"{file}: lacks the field {field!r}")
    for field, value in peft.items():
        accepted = ACCEPTED.get(field, OFF)
        if (field in ACCEPTED or field not in READ | HARMLESS) and value not in accepted:
            raise InputError(
                f"{file}: {field}={value!r} can't be represented; understood: "
                f"{', '.join(map(repr, accepted))}"
            )


def _check_scale(peft: Mapping[str, Any], config: DropLoRA, file: Path) -> None:
    """Raise InputError where the factors would mean another function."""
    if (peft["r"], peft["lora_alpha"]) != (config.rank, config.alpha):
        raise InputError(
            f"{file}: r={peft['r']}, lora_alpha={peft['lora_alpha']}, but the model's adapters "
            f"have rank={config.rank}, alpha={config.alpha:g}: give them the adapter's own"
        )


def _own_config(folder: Path, peft: Mapping[str, Any], names: list[str]) -> DropLoRA:
    """The adapter's options: its own file's, or plain LoRA on the modules that it holds."""
    if (folder / OWN_FILE).exists():
        own = read_json(folder / OWN_FILE)
        kind = own.get("kind")
        if kind not in ADAPTERS:
            raise InputError(
                f"{folder / OWN_FILE}: kind={kind!r} is not known; known: {', '.join(ADAPTERS)}"
            )
        fields = {field.name for field in dataclasses.fields(ADAPTERS[kind])}
        targets = own.get("targets")
        if isinstance(targets, list):
            own["targets"] = tuple(targets)
        return ADAPTERS[kind](**{key: value for key, value in own.items() if key in fields})
    modules = sorted({name.split(".")[-3] for name in names})
    targets = tuple(rf"(^|\.){module}$" for module in modules)
    return DropLoRA(rank=peft["r"], alpha=peft["lora_alpha"], drop_rate=0.0, targets=targets)
