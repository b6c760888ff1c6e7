"""Adapters as a PEFT folder, out and in; what only this project knows is in a file of its own."""

from __future__ import annotations

import dataclasses
import json
import math
from collections.abc import Collection, Iterator, Mapping
from pathlib import Path
from typing import Any

import jax
import numpy as np
from pydantic import TypeAdapter, ValidationError
from safetensors.numpy import save_file

from droplora_jax.adapters import ADAPTERS
from droplora_jax.adapters.base import base_path
from droplora_jax.adapters.config import Branch, LowRank
from droplora_jax.adapters.fully_trained import set_at, wholes_of
from droplora_jax.adapters.low_rank_layer import LowRankLinear
from droplora_jax.adapters.surgery import adapters_of, inject, view
from droplora_jax.core import distributed
from droplora_jax.core.errors import InputError
from droplora_jax.core.files import atomic_folder, read_json, write_json
from droplora_jax.hf.companions import copy_files, tokenizer_files, tokenizer_folder
from droplora_jax.hf.peft import ends
from droplora_jax.hf.peft.config import (
    PEFT_FILE,
    PeftFields,
    branch_of,
    peft_config,
)
from droplora_jax.hf.peft.consumers import misreadings, vllm_limits, vllm_options
from droplora_jax.hf.peft.folder import IGNORED, OWN_FILE, WEIGHTS_FILE, AdapterFolder
from droplora_jax.hf.peft.infer_config import config_of_peft
from droplora_jax.hf.peft.layout import Slot, checked_copies, slot_of_whole, slots_of, tied_factors
from droplora_jax.hf.peft.names import BaseNames
from droplora_jax.hf.safetensors_file import is_finite
from droplora_jax.hf.source import base_ties, base_vocabulary
from droplora_jax.hf.tensor_files import open_file
from droplora_jax.hf.weight_loading import ENDS, with_ends
from droplora_jax.models.config import ModelConfig
from droplora_jax.models.decoder import Decoder


def save_adapter(
    model: Decoder,
    folder: str | Path,
    *,
    extra: Mapping[str, object] | None = None,
    replace: bool = False,
) -> list[str]:
    """Write the adapters as a PEFT folder, in float32.

    `droplora_config.json` keeps the adapter's own options, and `extra` (such as the template that
    the data was written with). The folder appears under its name only when complete, in place of
    an old one with `replace`. All processes have to call it; the first one writes.

    Returns:
      What vLLM does not serve of it; empty if it does.

    Raises:
      InputError: no adapters, an output folder that holds something, no space.

    >>> import droplora_jax as dl
    >>> from droplora_jax.commands.quickstart import BASE  # a small model in the package
    >>> model = dl.inject(dl.load(BASE), dl.DropLoRA(rank=2), key=dl.root_key(0))
    >>> dl.save_adapter(model, "adapter")  # nothing in it that vLLM does not serve
    []
    """
    config = next(iter(_adapters(model).values())).config
    tensors = adapter_tensors(model)
    bad = [name for name, tensor in tensors.items() if not is_finite(tensor)]
    if bad:
        raise InputError(f"{bad[0]} is not finite ({len(bad)} tensors in all); nothing was written")
    peft = _peft_config(model, config)
    own = {"format_version": 1, **dataclasses.asdict(config), **_of_base(model), **(extra or {})}
    if distributed.first():
        with atomic_folder(Path(folder), replace=replace) as temporary:
            save_file(tensors, temporary / WEIGHTS_FILE, metadata={"format": "pt"})
            write_json(temporary / PEFT_FILE, peft)
            write_json(temporary / OWN_FILE, own)
            if model.source is not None:
                with tokenizer_folder(model.source) as tokenizer:
                    copy_files(tokenizer_files(tokenizer) if tokenizer else {}, temporary)
    distributed.wait_for_all("the adapter is written")
    return vllm_limits(peft, tensors, model.config.family)


def export(
    model: Decoder,
    folder: Path,
    *,
    dtype: str | None = None,
    record: Mapping[str, object] | None = None,
) -> str:
    """An `exporter.Exporter`: `save_adapter`, which stores float32.

    Raises:
      InputError: any other dtype.
    """
    if dtype not in (None, "float32"):
        raise InputError(f"dtype={dtype!r}: adapters are stored in float32")
    limits = save_adapter(model, folder, extra=record)
    text = f"{folder}: adapter in PEFT's format"
    if limits:
        text += (
            f"\nvLLM does not serve it as an adapter: it has {', '.join(limits)}. --format merged "
            "is for every tool"
        )
    peft = read_json(folder / PEFT_FILE)
    if not limits and (options := vllm_options(peft)):
        text += f"\n{options}"
    keys = open_file(folder / WEIGHTS_FILE).files
    return "\n".join([text, *_misreadings(model, peft, keys)])


def _misreadings(model: Decoder, peft: PeftFields, keys: Collection[str]) -> Iterator[str]:
    """What other tools get wrong with the adapter of a model."""
    source = model.source
    tied = model.config.tie_embeddings or (source is not None and base_ties(source))
    rows = model.config.vocab_size
    resized = source is not None and base_vocabulary(source) != rows
    return misreadings(peft, keys, tied=tied, rows=rows if resized else None)


def adapter_tensors(model: Decoder) -> dict[str, np.ndarray]:
    """By PEFT's names: lora_A [r, in], lora_B [out, r], and whatever else is trained."""
    tensors: dict[str, np.ndarray] = {}
    for path, adapter in _adapters(model).items():
        slots = slots_of(path, adapter, BaseNames(model.config))
        for name, value in adapter.stored().items():
            tensors |= slots[name].stored(distributed.to_host(value))
    tensors |= tied_factors(BaseNames(model.config), tensors)
    for where, whole in wholes_of(model).items():
        slot = slot_of_whole(where, model)
        tensors |= slot.stored(distributed.to_host(whole.get_value()))
    return tensors | _copies(model)


def _copies(model: Decoder) -> dict[str, np.ndarray]:
    """The ends of the model that are not the base's, where they are not trained as they are."""
    table, adapters = BaseNames(model.config).table, _adapters(model)
    adapted = {
        name.pattern: path.rpartition(".")[0] in adapters
        for path, name in table.items()
        if path.rpartition(".")[0] in ENDS
    }
    trained = [table[base_path(where)].pattern for where in wholes_of(model)]
    return ends.copies_to_store(model.source, adapted, trained)


def load_adapter(model: Decoder, folder: str | Path, *, config: LowRank | None = None) -> Decoder:
    """A view of `model` with the adapter of a PEFT folder, to use or to train on.

    Args:
      model: without adapters, or with ones of the same ranks, scales and targets.
      folder: written by `save_adapter` or by PEFT.
      config: how to train it on; default: `adapter_config`'s.

    Raises:
      InputError: a field that can't be represented, a tensor that is missing, of another shape
        (an adapter for another base) or not finite.

    >>> import droplora_jax as dl
    >>> from droplora_jax.commands.quickstart import BASE  # a small model in the package
    >>> base = dl.load(BASE)
    >>> model = dl.inject(base, dl.DropLoRA(rank=2), key=dl.root_key(0))
    >>> _ = dl.save_adapter(model, "adapter")
    >>> dl.load_adapter(base, "adapter").layers.q_proj.rank
    2
    """
    adapter = AdapterFolder.read(Path(folder))
    tensors, file = adapter.tensors, adapter.file
    if adapters_of(model):
        model = view(model)
    else:
        model = inject(
            _under(model, adapter), config or adapter_config(model.config, folder), key="later"
        )
    _check_scales(model, adapter.fields, adapter.path)
    used: set[str] = set()

    def filled(
        slot: Slot, like: jax.Array | jax.ShapeDtypeStruct, sharding: jax.sharding.Sharding
    ) -> jax.Array:
        used.update(slot.places)
        out = slot.filled(like.shape, tensors, file)
        return jax.make_array_from_callback(out.shape, sharding, lambda index: out[index])

    for path, layer in _adapters(model).items():
        slots = slots_of(path, layer, BaseNames(model.config))
        stored = jax.eval_shape(layer.stored)
        layer.fill(
            {
                name: filled(slots[name], like, getattr(layer, name).get_value().sharding)
                for name, like in stored.items()
            }
        )
    for where, whole in wholes_of(model).items():
        value = whole.get_value()
        trained = filled(slot_of_whole(where, model), value, value.sharding)
        set_at(model, where, whole.replace(trained))
    used |= checked_copies(model, _adapters(model), adapter)
    if extra := set(tensors.files) - used:
        raise InputError(
            f"{file}: {sorted(extra)[0]} has no place in the model "
            f"({len(extra)} such tensors): the adapter's targets are not the model's"
        )
    return model


def _under(model: Decoder, adapter: AdapterFolder) -> Decoder:
    """A model with the ends and the tokenizer that an adapter was trained with.

    A model that comes from no folder stays as it is; it has to have these ends already.
    """
    if model.source is None:
        return model
    return with_ends(model, *ends.under(model.config, model.source, [adapter.path]))


def adapter_config(shape: ModelConfig, folder: str | Path) -> LowRank:
    """What `inject` needs for the adapter of a PEFT folder, on a model of this shape.

    The adapter's own options where `droplora_config.json` has them; else `drop_rate=0`, the LoRA
    (or DoRA) that PEFT trained.

    Raises:
      InputError: a field or a tensor that can't be represented.
    """
    adapter = AdapterFolder.read(Path(folder))
    shape = ends.shape_under(shape, adapter)
    return _own_config(adapter.path) or config_of_peft(shape, adapter)


def _check_scales(model: Decoder, peft: PeftFields, folder: Path) -> None:
    """Raise InputError where the factors would mean another function."""
    names = BaseNames(model.config)
    for path, adapter in _adapters(model).items():
        for layer, branch in enumerate(map(adapter.config.stored, adapter.branches)):
            module = names.module(path, layer)
            theirs = branch_of(peft, module)
            same = branch.rank == theirs.rank and math.isclose(branch.scale, theirs.scale)
            if branch.rank and not same:
                raise InputError(
                    f"{folder / PEFT_FILE}: {module} has r={theirs.rank}, "
                    f"lora_alpha={theirs.alpha:g}, scale {theirs.scale:g}; the model's adapter has "
                    f"rank={branch.rank}, alpha={branch.alpha:g}, scale {branch.scale:g}: give it "
                    "the adapter's own"
                )


def _adapters(model: Decoder) -> dict[str, LowRankLinear]:
    adapters = adapters_of(model)
    if not adapters:
        raise InputError("the model has no adapters: inject(model, DropLoRA(...), key=...) first")
    return adapters  # type: ignore[return-value]


def _of_base(model: Decoder) -> dict[str, object]:
    """What to record of the base, besides what PEFT does."""
    ignored = model.source.ignored_config_keys if model.source else ()
    return {IGNORED: list(ignored)} if ignored else {}


def _peft_config(model: Decoder, config: LowRank) -> PeftFields:
    adapters, names = _adapters(model), BaseNames(model.config)
    none = Branch(0, config.alpha, 0.0)
    branches = {
        module: config.stored(adapters[path].branches[layer] if path in adapters else none)
        for module, (path, layer) in names.modules.items()
    }
    return peft_config(
        config,
        branches,
        config.stored(Branch(config.rank, config.alpha, 0.0)),
        _whole_fields(model),
        base=model.source.path if model.source else "",
        revision=model.source.revision if model.source else None,
        tied=model.config.tie_embeddings,
    )


def _whole_fields(model: Decoder) -> dict[str, Any]:
    """PEFT's `bias` and `modules_to_save` for what is trained whole."""
    adapters, names = _adapters(model), BaseNames(model.config)
    paths = {base_path(path) for path in wholes_of(model)}
    trained = {path for path in paths if path.endswith(".bias")}
    biases = {path for path in names.table if path.endswith(".bias")}
    beside = {path for path in biases if path.removesuffix(".bias") in adapters}
    whole_stacks = all(
        branch.rank for path in beside for branch in adapters[path.removesuffix(".bias")].branches
    )
    if not trained or trained == biases:
        bias = "all" if trained else "none"
    elif trained == beside and whole_stacks:
        bias = "lora_only"
    else:
        raise InputError(
            f"adapter.train_whole: the biases {', '.join(sorted(trained))} can't be said in "
            "PEFT's format, which knows all biases of the model, or those of the adapted layers"
        )
    modules = [names.table[path] for path in sorted(paths - trained)]
    ends = [name.module.rsplit(".", 1)[-1] if name.stacked else name.module for name in modules]
    return {"bias": bias, "modules_to_save": ends or None}


def _own_config(folder: Path) -> LowRank | None:
    file = folder / OWN_FILE
    if not file.exists():
        return None
    own = read_json(file)
    kind = own.get("kind")
    if kind not in ADAPTERS:
        raise InputError(f"{file}: kind={kind!r} is not known; known: {', '.join(ADAPTERS)}")
    fields = {field.name for field in dataclasses.fields(ADAPTERS[kind])}
    options = {key: value for key, value in own.items() if key in fields}
    try:
        # By way of JSON, where a list may stand for a tuple.
        return TypeAdapter(ADAPTERS[kind]).validate_json(json.dumps(options))
    except ValidationError as error:
        first = error.errors()[0]
        key = ".".join(map(str, first["loc"]))
        raise InputError(f"{file}: {key}: {first['msg']}") from error
