"""An adapter that PEFT wrote, as a configuration that makes a place for every tensor of it."""

from __future__ import annotations

import re
from collections.abc import Collection, Hashable, Mapping
from pathlib import Path
from typing import Any

from droplora_jax.adapters import ADAPTERS
from droplora_jax.adapters.config import Branch, LowRank
from droplora_jax.core.errors import InputError
from droplora_jax.hf.peft.config import PEFT_FILE, PeftFields, branch_of, is_target
from droplora_jax.hf.peft.ends import frozen_copies
from droplora_jax.hf.peft.folder import AdapterFolder
from droplora_jax.hf.peft.names import EMBED, HEAD, PREFIX, BaseNames, is_copy, split_key
from droplora_jax.hf.tensor_files import TensorFiles
from droplora_jax.models.config import ModelConfig


def config_of_peft(shape: ModelConfig, adapter: AdapterFolder) -> LowRank:
    """The LoRA or DoRA (`drop_rate=0`) that an adapter's tensors are.

    Args:
      shape: of the base as the adapter has it (`ends.shape_under`).

    Raises:
      InputError: a tensor that can't be represented, or that `adapter_config.json` does not name.
    """
    peft, tensors, file = adapter.fields, adapter.tensors, adapter.file
    branches = _branches(shape, peft, tensors, file)
    kind: Any = ADAPTERS["dora" if peft.get("use_dora") else "droplora"]
    rank, alpha = peft["r"], float(peft["lora_alpha"])
    ranks = _patterns(_each(branches, lambda branch: branch.rank), shape.layers)
    alphas = _patterns(_each(branches, lambda branch: branch.alpha), shape.layers)
    there = _patterns(_each(branches, lambda branch: True), shape.layers)
    return kind(
        rank=rank,
        alpha=alpha,
        drop_rate=0.0,
        targets=tuple(pattern for pattern, _ in there),
        rank_stabilized=bool(peft.get("use_rslora")),
        rank_pattern={pattern: own for pattern, own in ranks if own != rank},
        alpha_pattern={pattern: own for pattern, own in alphas if own != alpha},
        train_whole=_whole(shape, peft, tensors, file, frozen_copies(shape, adapter)),
    )


def _branches(
    shape: ModelConfig, peft: PeftFields, tensors: TensorFiles, file: Path
) -> dict[str, dict[int, Branch]]:
    """The branches that the file holds, by path and layer."""
    names = BaseNames(shape)
    modules = names.modules
    branches: dict[str, dict[int, Branch]] = {}
    for key in tensors.files:
        module, part = split_key(key)
        if part is None or key in names.tied_factors:
            continue
        if module not in modules:
            raise InputError(
                f"{file}: {key} adapts a module that has no adapter here (target_modules): only "
                f"linear layers of the base's {shape.layers} layers, embedding and head have. It "
                "can't be represented, or was made for another base"
            )
        if not _is_target(peft, module, names):
            raise InputError(
                f"{file}: {key} is there, but {PEFT_FILE} does not name {module} in "
                "target_modules, or leaves it out"
            )
        path, layer = modules[module]
        branches.setdefault(path, {})[layer] = branch_of(peft, module)
    if not branches:
        raise InputError(f"{file}: no lora_A and lora_B in it")
    return {path: dict(sorted(by_layer.items())) for path, by_layer in branches.items()}


def _is_target(peft: PeftFields, module: str, names: BaseNames) -> bool:
    """Whether PEFT adapts a module; with `ensure_weight_tying` it adapts the head as well."""
    tied = module == HEAD.rpartition(".")[0] and bool(peft.get("ensure_weight_tying"))
    return is_target(peft, module) or (tied and is_target(peft, names.module(EMBED, 0)))


def _whole(
    shape: ModelConfig, peft: PeftFields, tensors: TensorFiles, file: Path, frozen: Collection[str]
) -> tuple[str, ...]:
    """Patterns of the parameters that are trained whole; `frozen` are tensors that are not."""
    names = BaseNames(shape)
    layers: dict[str, set[int]] = {}
    for key in tensors.files:
        tensor, part = split_key(key)
        if part is not None or is_copy(key) or key in frozen:
            continue
        if not key.startswith(PREFIX) or tensor not in names.tensors:
            raise InputError(f"{file}: {key} {_why_not(key)}")
        path, layer = names.tensors[tensor]
        layers.setdefault(path, set()).add(layer)
    for path, some in layers.items():
        if names.table[path].stacked and len(some) < shape.layers:
            raise InputError(
                f"{file}: {names.table[path].of_layer(min(some))} is trained in {len(some)} of "
                f"{shape.layers} layers (modules_to_save, bias): that can't be represented"
            )
    modules = {
        tensor.rpartition(".")[0] for tensor in map(lambda key: split_key(key)[0], tensors.files)
    }
    for name in peft.get("modules_to_save") or ():
        if not any(f".{module}".endswith(name) for module in modules):
            raise InputError(
                f"{file.with_name(PEFT_FILE)}: modules_to_save={peft['modules_to_save']!r}, but "
                f"{file.name} has no tensor of {name!r}"
            )
    return tuple(f"^{re.escape(path)}$" for path in layers)


def _why_not(key: str) -> str:
    if ".default." in key:
        return (
            "has the name of PEFT's adapter in it ('default'): a state_dict was saved as it is, "
            "which PEFT would not read either. Save it with save_pretrained, or take '.default' "
            "out of the names"
        )
    if "lora_" in key:
        return "is of a kind (target_modules, lora_bias) that can't be represented"
    return "has no place in the model: the adapter was made for another base"


def _each(branches: Mapping[str, Mapping[int, Branch]], value: Any) -> dict[str, dict[int, Any]]:
    return {path: {i: value(own) for i, own in of.items()} for path, of in branches.items()}


def _patterns(values: Mapping[str, Mapping[int, Hashable]], layers: int) -> list[tuple[str, Any]]:
    """Values by path and layer, as patterns that are searched in the layers' names."""
    patterns: list[tuple[str, Any]] = []
    for path, by_layer in values.items():
        owner, dot, last = (re.escape(part) for part in path.rpartition("."))
        for value in dict.fromkeys(by_layer.values()):
            some = [str(layer) for layer, own in by_layer.items() if own == value]
            whole = not owner or len(some) == layers  # the ends of a model are no stacks
            indices = "" if whole else rf"({'|'.join(some)})\."
            patterns.append((rf"^{owner}{dot}{indices}{last}$", value))
    return patterns
