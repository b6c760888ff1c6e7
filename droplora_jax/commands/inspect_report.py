"""What a folder is, and what an adapter in it does to each layer."""

from __future__ import annotations

import dataclasses
import io
import json
import math
import re
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import jax
import numpy as np
from rich.box import SIMPLE_HEAD
from rich.console import Console
from rich.table import Table

from droplora_jax.adapters.spectrum import effective_rank, ranks_for, singular_values
from droplora_jax.core.console import say
from droplora_jax.core.errors import InputError
from droplora_jax.core.files import check_absent, read_json, write_file
from droplora_jax.core.sharding import make_mesh
from droplora_jax.hf.base import Base
from droplora_jax.hf.companions import REPORT_FILE
from droplora_jax.hf.peft.config import PEFT_FILE, branch_of
from droplora_jax.hf.peft.consumers import vllm_limits
from droplora_jax.hf.peft.folder import AdapterFolder, adapter_notes
from droplora_jax.hf.peft.names import EMBEDDING_A, EMBEDDING_B, PREFIX, A, B, is_copy, split_key
from droplora_jax.hf.tensor_files import TensorFiles, open_source
from droplora_jax.hf.weight_loading import check_tensors
from droplora_jax.runs import config_reader
from droplora_jax.runs.folder import ADAPTER, CONFIG_FILE, progress

ENERGY = 0.9
BARS = " ▁▂▃▄▅▆▇█"
BINS = 8  # of the spectrum in a table


@dataclass(frozen=True)
class Layer:
    """What an adapter adds to one linear layer, `scale * A @ B`.

    Attributes:
      module, layer: such as `q_proj` of layer 3.
      norm: Frobenius norm of the delta.
      effective_rank: exp of the entropy of the singular values as shares.
      ranks_for_energy: how many singular values carry 90% of the sum of their squares.
      spectrum: the singular values, largest first.
    """

    name: str
    module: str
    layer: int
    rank: int
    scale: float
    norm: float
    effective_rank: float
    ranks_for_energy: int
    spectrum: tuple[float, ...]


def show(
    folder: Path,
    *,
    as_json: bool,
    picture: Path | None,
    console: Console,
    ignore_config_keys: Sequence[str] = (),
) -> None:
    """Print what a folder is; also draws its adapter's layers into the file `picture`.

    Args:
      ignore_config_keys: keys of a base's `config.json` known to change nothing.

    Raises:
      InputError: no folder of a kind that is known, or one that is broken.
    """
    if picture is not None:
        check_absent(picture)
    description = describe(folder, ignore_config_keys)
    layers = description.pop("branches", [])
    if picture is not None:
        if not layers:
            kind = description["kind"]
            raise InputError(f"{folder}: a {kind} has no adapter to draw (--png)")
        write_file(picture, heat_map(layers))
    if as_json:
        if layers:
            description["branches"] = [asdict(layer) for layer in layers]
        console.out(json.dumps(description, indent=2), highlight=False)
        return
    for key, value in description.items():
        say(console, f"{key.replace('_', ' ')}: {_shown(value)}")
    if layers:
        console.print(table(layers))


def describe(folder: Path, ignore_config_keys: Sequence[str] = ()) -> dict[str, Any]:
    """`kind` (`base`, `merged`, `adapter` or `run`), and what there is to say of such a one."""
    if not folder.is_dir():
        raise InputError(f"{folder}: no such folder")
    if (folder / CONFIG_FILE).exists():
        return _run(folder)
    if (folder / PEFT_FILE).exists():
        return _adapter(folder)
    if (folder / "config.json").exists():
        return _model(folder, ignore_config_keys)
    raise InputError(
        f"{folder}: no model (config.json), no adapter ({PEFT_FILE}), no run ({CONFIG_FILE}) in it"
    )


def _run(folder: Path) -> dict[str, Any]:
    config = config_reader.read(folder / CONFIG_FILE)
    there = _adapter(folder / ADAPTER) if (folder / ADAPTER).exists() else {}
    options = dataclasses.asdict(config.adapter)
    return {
        "kind": "run",
        "base": config.model.path,
        "adapter_kind": config.adapter.kind,
        **{key: options[key] for key in ("drop_rate",) if key in options},
        "last_checkpoint": progress(folder).step or None,
        "finished": bool(there),
        **{key: there[key] for key in ("rank", "alpha", "bytes", "branches") if key in there},
    }


def _adapter(folder: Path) -> dict[str, Any]:
    adapter = AdapterFolder.read(folder)
    peft, tensors = adapter.fields, adapter.tensors
    own = adapter_notes(folder)
    whole = [
        key.removeprefix(PREFIX)
        for key in tensors.files
        if split_key(key)[1] is None and not is_copy(key)
    ]
    limits = vllm_limits(peft, tensors.files)
    return {
        "kind": "adapter",
        "adapter_kind": own.get("kind", "dora" if peft.get("use_dora") else "lora"),
        "base": peft.get("base_model_name_or_path"),
        "rank": peft["r"],
        "alpha": peft["lora_alpha"],
        **{key: own[key] for key in ("drop_rate", "granularity", "template") if key in own},
        **({"trained_whole": whole} if whole else {}),
        **_sizes(tensors),
        "vllm": f"no: {', '.join(limits)}" if limits else "serves it",
        "branches": _layers(peft, tensors, adapter.file),
    }


def _model(folder: Path, ignore_config_keys: Sequence[str]) -> dict[str, Any]:
    base = Base.open(folder, ignore=ignore_config_keys)
    shape, tensors = base.shape, open_source(base.source)
    model = base.abstract(make_mesh(devices=jax.devices()[:1]), dtype="float32")
    check_tensors(tensors, folder, model)
    merged = (folder / REPORT_FILE).exists()
    report = read_json(folder / REPORT_FILE) if merged else {}
    worst = next(iter(report.get("rounding", {}).items()), None)
    return {
        "kind": "merged" if merged else "base",
        "family": shape.family,
        "layers": f"{shape.layers} of width {shape.width}",
        "heads": f"{shape.heads}, {shape.kv_heads} of keys and values",
        "vocabulary": shape.vocab_size,
        "positions": shape.max_positions,
        "head": "the embedding" if shape.tie_embeddings else "its own",
        **_sizes(tensors),
        **({"merged_from": report.get("base")} if merged else {}),
        **({"logits_difference": report.get("logits_difference")} if merged else {}),
        **({"rounding_took_at_most": f"{worst[1]:.1e} ({worst[0]})"} if worst and worst[1] else {}),
    }


def _sizes(tensors: TensorFiles) -> dict[str, Any]:
    """Parameters and bytes, by dtype."""
    counts: dict[str, int] = {}
    size = 0
    for name in tensors.files:
        count, dtype = math.prod(tensors.shape(name)), tensors.dtype(name)
        counts[dtype.name] = counts.get(dtype.name, 0) + count
        size += count * dtype.itemsize
    return {"tensors": len(tensors.files), "parameters": counts, "bytes": size}


def _layers(peft: Mapping[str, Any], tensors: TensorFiles, file: Path) -> list[Layer]:
    layers = []
    for key in tensors.files:
        name, part = split_key(key)
        if part not in (A, EMBEDDING_A):
            continue
        other = f"{PREFIX}{name}{B if part == A else EMBEDDING_B}"
        if other not in tensors.files:
            raise InputError(f"{file}: lacks {other}")
        a_RI, b_OR = tensors.read(key), tensors.read(other)
        if a_RI.ndim != 2 or b_OR.ndim != 2 or len(a_RI) != b_OR.shape[1]:
            raise InputError(f"{file}: {key} {a_RI.shape} does not fit lora_B {b_OR.shape}")
        scale = branch_of(peft, name).scale
        values = scale * singular_values(a_RI.T, b_OR.T)
        index = re.search(r"\.(\d+)\.", name)
        layers.append(
            Layer(
                name=name,
                module=name.rsplit(".", 1)[-1],
                layer=int(index.group(1)) if index else 0,
                rank=len(a_RI),
                scale=scale,
                norm=float(np.linalg.norm(values)),
                effective_rank=effective_rank(values),
                ranks_for_energy=ranks_for(values, ENERGY),
                spectrum=tuple(map(float, values)),
            )
        )
    return sorted(layers, key=lambda layer: (layer.module, layer.layer))


def table(layers: list[Layer]) -> Table:
    """One line a module, over its layers: median, and smallest to largest."""
    shown = Table(box=SIMPLE_HEAD, padding=(0, 1, 0, 0))
    for column in ("module", "layers", "rank", "for 90%", "norm of delta", "effective rank"):
        shown.add_column(column, overflow="fold")
    shown.add_column("spectrum", no_wrap=True)
    for module in dict.fromkeys(layer.module for layer in layers):
        own = [layer for layer in layers if layer.module == module]
        shown.add_row(
            module,
            str(len(own)),
            _range([layer.rank for layer in own], "d"),
            _range([layer.ranks_for_energy for layer in own], "d"),
            _range([layer.norm for layer in own], ".3g"),
            _range([layer.effective_rank for layer in own], ".1f"),
            _bars(own),
        )
    return shown


def _range(values: list[Any], form: str) -> str:
    if min(values) == max(values):
        return format(values[0], form)
    middle = sorted(values)[len(values) // 2]
    return f"{middle:{form}} ({min(values):{form}}..{max(values):{form}})"


def _bars(layers: list[Layer]) -> str:
    """The mean spectrum of some layers, each scaled to its largest value, as small bars."""
    longest = max(len(layer.spectrum) for layer in layers)
    mean = np.zeros(longest)
    for layer in layers:
        values = np.asarray(layer.spectrum)
        mean[: len(values)] += values / (values[0] or 1.0) / len(layers)
    parts = [part.mean() for part in np.array_split(mean, min(BINS, longest))]
    return "".join(BARS[math.ceil(value * (len(BARS) - 1) - 1e-9)] for value in parts)


def heat_map(layers: list[Layer]) -> bytes:
    """A PNG: modules down, layers across; norm of the delta, and effective rank as a share."""
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    modules = list(dict.fromkeys(layer.module for layer in layers))
    count = max(layer.layer for layer in layers) + 1
    panels = {
        "norm of the delta": lambda layer: layer.norm,
        "effective rank / rank": lambda layer: layer.effective_rank / layer.rank,
    }
    height = 1.2 + 0.35 * len(modules)
    figure = Figure(figsize=(max(6.0, 2.2 + 0.28 * count), 2 * height), layout="constrained")
    FigureCanvasAgg(figure)
    for axes, (title, value) in zip(figure.subplots(2, 1), panels.items(), strict=True):
        cells = np.full((len(modules), count), np.nan)
        for layer in layers:
            cells[modules.index(layer.module), layer.layer] = value(layer)
        image = axes.imshow(cells, aspect="auto", cmap="viridis", interpolation="nearest")
        axes.set(title=title, xlabel="layer")
        axes.set_yticks(range(len(modules)), modules)
        axes.xaxis.get_major_locator().set_params(integer=True)
        figure.colorbar(image, ax=axes)
    picture = io.BytesIO()
    figure.savefig(picture, dpi=120, format="png")
    return picture.getvalue()


def _shown(value: Any) -> str:
    if isinstance(value, dict):
        return ", ".join(f"{count:,} {name}" for name, count in value.items())
    if isinstance(value, list):
        return ", ".join(map(str, value))
    return f"{value:,}" if isinstance(value, int) and not isinstance(value, bool) else str(value)
