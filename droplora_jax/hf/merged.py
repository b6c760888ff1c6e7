"""Base + adapters as a plain Hugging Face folder, written tensor by tensor and then verified."""

from __future__ import annotations

import math
import os
from collections.abc import Callable, Mapping
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from functools import partial
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
from numpy.typing import DTypeLike

from droplora_jax.adapters.base import base_path
from droplora_jax.adapters.fully_trained import wholes_of
from droplora_jax.adapters.surgery import adapters_of
from droplora_jax.core import distributed
from droplora_jax.core.errors import InputError
from droplora_jax.core.files import atomic_folder, check_free, read_json, write_json
from droplora_jax.data.end_markers import RECORD_KEY, EndMarkers
from droplora_jax.hf.companions import (
    REPORT_FILE,
    companions,
    copy_files,
    has_vocabulary,
    tokenizer_folder,
)
from droplora_jax.hf.generation_config import add_end_tokens
from droplora_jax.hf.merge_report import (
    MergeReport,
    from_adapter,
    over_quantized_base,
    without_rows,
)
from droplora_jax.hf.peft.folder import quantization_of_record
from droplora_jax.hf.safetensors_file import TensorWriter, is_finite
from droplora_jax.hf.source import source_of_model
from droplora_jax.hf.tensor_files import (
    INDEX_FILE,
    SINGLE_FILE,
    Each,
    TensorFiles,
    open_source,
    turned,
)
from droplora_jax.hf.tokenizer import load_tokenizer
from droplora_jax.hf.verify import HEAD, probe
from droplora_jax.models.config import Source
from droplora_jax.models.decoder import Decoder
from droplora_jax.models.families import FAMILIES
from droplora_jax.nn.options import Quantization


def save_merged(
    model: Decoder,
    folder: str | Path,
    *,
    dtype: DTypeLike | None = None,
    trained_over: Quantization | None = None,
    end_markers: EndMarkers = EndMarkers(),
) -> MergeReport:
    """Write the merged model as a Hugging Face folder.

    The base's own shards are read again, one tensor in memory at a time, so `model` needs its
    adapters but no base weights. The sum is made in float32 and cast once, to the base's stored
    dtype or to `dtype`. The folder appears under its name only when complete, read back bit for
    bit, and found to compute what base + adapter do (`probe`, which holds one layer in float32).
    `droplora_merge.json` in it keeps the report. If the adapter was `trained_over` a quantised
    base, the report says what the full precision of this one changes. The tokens of `end_markers`,
    such as those of `open_model(...)`, join the EOS tokens in its `generation_config.json`.

    Raises:
      InputError: an output folder that holds something, a value that is not finite, no space;
        or one of several processes, none of which has all of the adapters.

    >>> import droplora_jax as dl
    >>> from droplora_jax.commands.quickstart import BASE  # a small model in the package
    >>> model = dl.inject(dl.load(BASE), dl.DropLoRA(rank=2), key=dl.root_key(0))
    >>> report = dl.save_merged(model, "merged")
    >>> report.difference < 1e-4
    True
    """
    folder = Path(folder)
    if distributed.several():
        raise InputError(
            f"{folder}: save_merged works in one process: save_adapter here, and then "
            "`droplora export` anywhere"
        )
    check_free(folder)
    source = source_of_model(model)
    with ThreadPoolExecutor(os.cpu_count()) as pool, atomic_folder(folder) as temporary:
        merged = MergedBase(open_source(source), merges_by_tensor(model), dtype, pool.map)
        rounding = _write_shards(merged, temporary)
        with tokenizer_folder(source) as tokenizer:
            copy_files(companions(source.folder, tokenizer), temporary)
        _update_config(temporary / "config.json", model, dtype)
        add_end_tokens(temporary, (*end_markers.token_ids, *_eos_of_adapter(source, temporary)))
        if list(merged.base.shards()) != [SINGLE_FILE]:
            write_json(temporary / INDEX_FILE, _index(merged))
        report = MergeReport(
            folder=folder,
            tensors=len(merged.base.files),
            merged=len(merged.merges.keys() & merged.base.files.keys()),
            rounding=tuple(sorted(rounding.items(), key=lambda item: -item[1])),
            difference=probe(model, merged.reference, temporary, pool.map),
            notes=(
                *from_adapter(model),
                *without_rows(model, temporary),
                *over_quantized_base(model, merged.stored, trained_over, temporary, merged.each),
            ),
        )
        write_json(temporary / REPORT_FILE, _as_json(report, model))
    return report


def export(
    model: Decoder,
    folder: Path,
    *,
    dtype: str | None = None,
    record: Mapping[str, object] | None = None,
) -> str:
    """An `exporter.Exporter`: `save_merged`, which records its own report and the end markers."""
    record = record or {}
    return str(
        save_merged(
            model,
            folder,
            dtype=dtype,
            trained_over=quantization_of_record(record),
            end_markers=EndMarkers.of_record(record.get(RECORD_KEY)),
        )
    )


def _write_shards(merged: MergedBase, folder: Path) -> dict[str, float]:
    """Write the shards of the base with the adapter merged in; the rounding of merged tensors."""
    rounding: dict[str, float] = {}
    for shard, names in merged.base.shards().items():
        entries = {name: (merged.dtype_of(name), merged.base.shape(name)) for name in names}
        with TensorWriter(folder / shard, entries) as writer:
            for name in names:
                tensor, lost = merged.tensor(name)
                writer.write(name, tensor)
                if lost is not None:
                    rounding[name] = lost
    return rounding


def _index(merged: MergedBase) -> dict[str, object]:
    """The index of the shards, whose sizes `dtype` may have changed."""
    base = merged.base
    weight_map = {name: shard for shard, names in base.shards().items() for name in names}
    size = sum(math.prod(base.shape(name)) * merged.dtype_of(name).itemsize for name in weight_map)
    return {"metadata": {"total_size": size}, "weight_map": weight_map}


def _as_json(report: MergeReport, model: Decoder) -> dict[str, object]:
    source = source_of_model(model)
    return {
        "format_version": 1,
        "base": source.path,
        "base_revision": source.revision,
        "ignored_config_keys": list(source.ignored_config_keys),
        "logits_difference": report.difference,
        "rounding": dict(report.rounding),
        "notes": list(report.notes),
    }


@dataclass(frozen=True)
class Merge:
    """What an adapter makes of one stored tensor.

    Attributes:
      run: the kernel as the model has it to the kernel with its adapter, in float32.
      transposed: the kernel is the transpose of what is stored.
      replaces: the base's value does not count.
    """

    run: Callable[[np.ndarray], np.ndarray]
    transposed: bool
    replaces: bool = False


def merges_by_tensor(model: Decoder) -> dict[str, Merge]:
    """The merge of every tensor that has an adapter, under each name that it may be stored as."""
    names = FAMILIES[model.config.family].tensor_names(model.config)
    merges: dict[str, Merge] = {}
    for path, adapter in adapters_of(model).items():
        name = names[f"{path}.{adapter.spec.attribute}"]
        merger = adapter.merger()

        def run(kernel, index, merger=merger):
            return np.asarray(merger(kernel, *index))

        for layer, adapted in enumerate(adapter.adapted):
            if adapted:
                of_layer = partial(run, index=(layer,) if name.stacked else ())
                merges[name.of_layer(layer)] = Merge(of_layer, name.transposed)
    for where, trained in wholes_of(model).items():
        name, value = names[base_path(where)], trained.get_value()
        for layer in range(model.config.layers if name.stacked else 1):
            replace = partial(_replacement, value[layer] if name.stacked else value)
            merges[name.of_layer(layer)] = Merge(replace, name.transposed, replaces=True)
    embedding = merges.get(names["embed.embedding"].pattern)
    if model.config.tie_embeddings and embedding is not None:
        merges[HEAD] = embedding  # for files that hold a copy of it
    return merges


def _replacement(value: jax.Array, kernel: np.ndarray) -> np.ndarray:
    """A fully trained parameter, which takes the place of the base's."""
    return np.asarray(value)


@dataclass(frozen=True)
class MergedBase:
    """The tensors of a base with an adapter merged in, made one at a time; none is kept.

    Attributes:
      merges: the merge of every tensor that has an adapter.
      dtype: of all tensors; None keeps the one that each is stored in.
      each: a `map` to read with, such as that of a pool of threads.
    """

    base: TensorFiles
    merges: Mapping[str, Merge]
    dtype: DTypeLike | None
    each: Each

    def dtype_of(self, name: str) -> np.dtype:
        return np.dtype(self.dtype or self.base.dtype(name))

    def tensor(self, name: str) -> tuple[np.ndarray, float | None]:
        """A tensor as it is stored; and the share of the adapter that the cast took, if it has one.

        Raises:
          InputError: a value that is not finite.
        """
        merge = self.merges.get(name)
        if merge is None:
            stored = _cast(self._read(name), self.dtype_of(name))
            self._check_finite(name, stored)
            return stored, None
        kernel, merged, stored = self._merged(name, merge)
        self._check_finite(name, stored)
        lost = float(_rounding_loss(kernel, merged, stored))
        return (turned(stored, self.each) if merge.transposed else stored), lost

    def stored(
        self, name: str, index: tuple[slice, ...] = (), transposed: bool = False
    ) -> np.ndarray:
        """A tensor of the base in float32, or the fully trained one that takes its place."""
        merge = self.merges.get(name)
        if merge is not None and merge.replaces:
            return self.reference(name, index, transposed)
        return self._read(name, index, transposed).astype(np.float32, copy=False)

    def reference(
        self, name: str, index: tuple[slice, ...] = (), transposed: bool = False
    ) -> np.ndarray:
        """A base tensor in float32, less what the cast of its merge takes: see `probe`.

        An adapted tensor is merged once more for it: to keep what `tensor` merged would take the
        memory of the whole model.
        """
        merge = self.merges.get(name)
        if merge is None:
            stored = _cast(self._read(name, index, transposed), self.dtype_of(name))
            return stored.astype(np.float32, copy=False)
        kernel, merged, stored = self._merged(name, merge)
        if not merge.replaces:
            stored = np.asarray(_less_rounding(kernel, merged, stored))
        value = stored.astype(np.float32, copy=False)
        return (value if merge.transposed == transposed else value.T)[index]

    def _merged(self, name: str, merge: Merge) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
        """The base's kernel, the sum in float32, and the sum cast to what is stored."""
        kernel = self._read(name, transposed=merge.transposed)
        merged = merge.run(kernel)
        return kernel, merged, _cast(merged, self.dtype_of(name))

    def _read(
        self, name: str, index: tuple[slice, ...] = (), transposed: bool = False
    ) -> np.ndarray:
        return self.base.read(name, index, transposed=transposed, each=self.each)

    def _check_finite(self, name: str, stored: np.ndarray) -> None:
        if not is_finite(stored):
            raise InputError(
                f"{self.base.files[name]}: {name} is not finite once the adapter is merged into "
                f"{stored.dtype.name}; the base or the adapter holds NaN, infinity or values too "
                "large"
            )


def _cast(value: np.ndarray, dtype: np.dtype) -> np.ndarray:
    with np.errstate(over="ignore"):  # what is not finite is refused by its name
        return value.astype(dtype, copy=False)


@jax.jit
def _rounding_loss(kernel: jax.Array, merged: jax.Array, out: jax.Array) -> jax.Array:
    """||stored delta - delta|| / ||delta||; 0 of an adapter that does nothing."""
    size = jnp.linalg.norm(merged - kernel.astype(jnp.float32))
    return jnp.linalg.norm(out.astype(jnp.float32) - merged) / jnp.where(size, size, 1.0)


@jax.jit
def _less_rounding(kernel: jax.Array, merged: jax.Array, out: jax.Array) -> jax.Array:
    return kernel.astype(jnp.float32) + (out.astype(jnp.float32) - merged)


def _eos_of_adapter(source: Source, folder: Path) -> tuple[int, ...]:
    """The EOS token of a tokenizer that the adapter has brought into the folder."""
    if source.tokenizer is None or not has_vocabulary(folder):
        return ()
    try:
        eos = load_tokenizer(folder).eos_token_id
    except InputError:
        return ()  # which `_without_rows` says
    return () if eos is None else (eos,)


def _update_config(file: Path, model: Decoder, dtype: DTypeLike | None) -> None:
    """Let the base's `config.json` say what an adapter or `dtype` has changed."""
    config = read_json(file)
    changed: dict[str, object] = {}
    if model.config.vocab_size != config["vocab_size"]:
        changed["vocab_size"] = model.config.vocab_size
    if model.config.tie_embeddings != bool(config.get("tie_word_embeddings", False)):
        changed["tie_word_embeddings"] = model.config.tie_embeddings
    if dtype is not None:
        config.pop("torch_dtype", None)
        changed["dtype"] = np.dtype(dtype).name
    if changed:
        write_json(file, {**config, **changed})
