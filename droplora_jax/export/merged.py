"""Base + adapters as a plain Hugging Face folder, written shard by shard and then verified."""

from __future__ import annotations

import shutil
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from functools import partial
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
from numpy.typing import DTypeLike
from safetensors.numpy import save_file

from droplora_jax import hub
from droplora_jax.errors import InputError
from droplora_jax.export.probe import probe
from droplora_jax.files import atomic_folder, check_free, read_json, write_json
from droplora_jax.models import FAMILIES, Decoder
from droplora_jax.surgery import adapters_of
from droplora_jax.weights import (
    INDEX_FILE,
    TensorFiles,
    open_folder,
)

# What is carried over from the base beside the weights.
CARRIED = ("*.json", "tokenizer*", "*.model", "*.jinja", "merges.txt", "LICENSE*", "USE_POLICY*")


@dataclass(frozen=True)
class MergeReport:
    """What was written, and what casting the merge to the stored dtype took of the adapter.

    Attributes:
      tensors: number of tensors in the folder; `merged` of them hold an adapter.
      rounding: per merged tensor, ||stored delta - delta|| / ||delta||, largest first.
      difference: of the folder's float32 logits from base + adapter's, relative (see `probe`).
    """

    folder: Path
    tensors: int
    merged: int
    rounding: tuple[tuple[str, float], ...]
    difference: float

    def __str__(self) -> str:
        text = (
            f"{self.folder}: {self.merged} of {self.tensors} tensors merged; read back bit for "
            f"bit; float32 logits differ from those of base + adapter by {self.difference:.1e}"
        )
        name, worst = self.rounding[0] if self.rounding else ("", 0.0)
        if worst:
            text += f"; rounding took at most {worst:.1e} of the adapter (relative; {name})"
        return text


def save_merged(
    model: Decoder, folder: str | Path, *, dtype: DTypeLike | None = None
) -> MergeReport:
    """Write the merged model as a Hugging Face folder.

    The base's own shards are read again, one in memory at a time, so `model` needs its adapters
    but no base weights. The sum is made in float32 and cast once, to the base's stored dtype or
    to `dtype`. The folder appears under its name only when complete, read back bit for bit, and
    found to compute what base + adapter do (`probe`, which holds one layer in float32).

    Raises:
      InputError: an output folder that holds something, a value that is not finite, no space.
    """
    folder = Path(folder)
    check_free(folder)
    base_folder = hub.source_folder(model)
    base = open_folder(base_folder)
    merges = merges_by_tensor(model)
    rounding: dict[str, float] = {}
    total_size = 0
    with atomic_folder(folder) as temporary:
        for shard, names in base.shards().items():
            tensors = dict(_merged_shard(base, names, merges, dtype, rounding))
            save_file(tensors, temporary / shard.name, metadata={"format": "pt"})
            _verify(temporary / shard.name, tensors)
            total_size += sum(tensor.nbytes for tensor in tensors.values())
            del tensors
        _carry_over(base_folder, temporary, dtype)
        if (base_folder / INDEX_FILE).exists():
            weight_map = {name: file.name for name, file in base.files.items()}
            index = {"metadata": {"total_size": total_size}, "weight_map": weight_map}
            write_json(temporary / INDEX_FILE, index)
        difference = probe(model, partial(_less_rounding, base, merges, dtype), temporary)
    worst_first = sorted(rounding.items(), key=lambda item: -item[1])
    return MergeReport(folder, len(base.files), len(merges), tuple(worst_first), difference)


Merge = Callable[[np.ndarray], np.ndarray]


def merges_by_tensor(model: Decoder) -> dict[str, Merge]:
    """For every stored tensor with an adapter: stored value to float32 merge, as stored."""
    names = FAMILIES[model.config.family].tensor_names(model.config)
    merges: dict[str, Merge] = {}
    for path, adapter in adapters_of(model).items():
        name = names[f"{path}.{adapter.spec.attribute}"]
        merge = jax.jit(adapter.merged_kernel, static_argnums=1)
        for layer in range(model.config.layers):
            merges[name.of_layer(layer)] = _as_stored(merge, layer, name.transposed)
    return merges


def _as_stored(merge: Callable, layer: int, transposed: bool) -> Merge:
    def run(stored: np.ndarray) -> np.ndarray:
        kernel = stored.T if transposed else stored
        merged = np.asarray(merge(jnp.asarray(kernel), (layer,)))
        return merged.T if transposed else merged

    return run


def _merged_shard(
    base: TensorFiles,
    names: list[str],
    merges: dict[str, Merge],
    dtype: DTypeLike | None,
    rounding: dict[str, float],
) -> Iterator[tuple[str, np.ndarray]]:
    for name in names:
        stored = base.read(name)
        target = np.dtype(dtype or stored.dtype)
        if name not in merges:
            yield name, np.ascontiguousarray(stored.astype(target))
            continue
        merged = merges[name](stored)
        with np.errstate(over="ignore"):
            out = np.ascontiguousarray(merged.astype(target))
        if not np.isfinite(out).all():
            raise InputError(
                f"{base.files[name]}: {name} is not finite once the adapter is merged into "
                f"{target.name}; the base or the adapter holds NaN, infinity or values too large"
            )
        rounding[name] = _rounding_loss(stored, merged, out)
        yield name, out


def _less_rounding(
    base: TensorFiles, merges: dict[str, Merge], dtype: DTypeLike | None, name: str
) -> np.ndarray:
    """A base tensor in float32, less what the cast of its merge takes: see `probe`."""
    stored = base.read(name)
    target = np.dtype(dtype or stored.dtype)
    if name not in merges:
        return stored.astype(target).astype(np.float32)
    merged = merges[name](stored)
    return stored.astype(np.float32) + (merged.astype(target).astype(np.float32) - merged)


def _rounding_loss(stored: np.ndarray, merged: np.ndarray, out: np.ndarray) -> float:
    delta = merged - stored.astype(np.float32)
    size = float(np.linalg.norm(delta))
    return float(np.linalg.norm(out.astype(np.float32) - merged)) / size if size else 0.0


def _verify(file: Path, tensors: dict[str, np.ndarray]) -> None:
    """Read a shard back and compare every tensor's bytes."""
    written = TensorFiles({name: file for name in tensors})
    for name, expected in tensors.items():
        actual = written.read(name)
        if actual.dtype != expected.dtype or actual.tobytes() != expected.tobytes():
            raise OSError(f"{name} was not read back from {file.name} as it was written")


def _carry_over(source: Path, target: Path, dtype: DTypeLike | None) -> None:
    for pattern in CARRIED:
        for file in source.glob(pattern):
            # An index names files; the merged folder has its own, or none.
            if file.is_file() and not file.name.endswith(".index.json"):
                shutil.copyfile(file, target / file.name)
    if dtype is not None:
        config = read_json(target / "config.json")
        config.pop("torch_dtype", None)
        write_json(target / "config.json", {**config, "dtype": np.dtype(dtype).name})
