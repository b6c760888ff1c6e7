"""Merged folders: what transformers loads, what is verified, and what leaves nothing."""

from __future__ import annotations

import errno
import json
import re
import resource
import shutil
from collections.abc import Callable
from contextlib import contextmanager
from dataclasses import replace
from functools import partial
from pathlib import Path

import jax
import jax.numpy as jnp
import ml_dtypes
import numpy as np
import pytest
import torch
from flax import nnx
from oracles import (
    Folder,
    random_tokens,
    randomized,
    relative,
    torch_logits,
)
from safetensors import safe_open
from safetensors.numpy import load_file
from small_models import load
from transformers import AutoModelForCausalLM

import droplora_jax as dl
from droplora_jax.adapters.surgery import adapters_of, view
from droplora_jax.hf import EXPORTERS, merged
from droplora_jax.hf.exporter import exporter
from droplora_jax.hf.merge_report import MergeReport
from droplora_jax.models.parameter_table import PARAMETERS

KEY = dl.root_key(0)
TOKENS = random_tokens(2, 80)
OPTIONS = {"rank": 4, "alpha": 6.0}


@nnx.jit
def forward(model, tokens):
    return model(tokens)


def adapted(
    folder: Folder | Path, size: float = 0.2, targets: str = "paper", **loaded
) -> nnx.Module:
    config = dl.DropLoRA(**OPTIONS, targets=targets)
    return randomized(dl.inject(load(folder, **loaded), config, key=KEY), size=size)


def tensors_of(folder: Path) -> dict[str, np.ndarray]:
    tensors: dict[str, np.ndarray] = {}
    for file in sorted(folder.glob("*.safetensors")):
        tensors |= load_file(file)
    return tensors


def adapted_names(model: nnx.Module) -> dict[str, tuple[str, int]]:
    """The stored tensors with an adapter: adapter path and layer."""
    return {
        NAMES[f"{path}.kernel"].of_layer(layer): (path, layer)
        for path in adapters_of(model)
        for layer in range(model.config.layers)
    }


@pytest.fixture(scope="module")
def shared(untied: Folder) -> nnx.Module:
    return adapted(untied)


@pytest.fixture
def model(shared) -> nnx.Module:
    """Modules of a test's own over the variables of `shared`."""
    return view(shared)


@pytest.fixture(scope="module")
def merged_folder(shared, tmp_path_factory) -> Path:
    """The merge of `shared`."""
    folder = tmp_path_factory.mktemp("merged") / "out"
    dl.save_merged(shared, folder)
    return folder


# A merged folder.


@pytest.mark.parametrize(("folder", "targets"), [("untied", "all-linear"), ("tied", "paper")])
def test_transformers_loads_the_merged_folder(folder, targets, request, tmp_path):
    folder = request.getfixturevalue(folder)
    model = adapted(folder, targets=targets)
    report = dl.save_merged(model, tmp_path / "out")
    theirs = AutoModelForCausalLM.from_pretrained(tmp_path / "out", dtype=torch.float32)
    logits = forward(model, TOKENS)
    assert relative(torch_logits(theirs, TOKENS), logits) < 1e-4
    assert relative(folder.logits(TOKENS), logits) > 0.1
    assert relative(forward(load(tmp_path / "out"), TOKENS), logits) < 1e-5
    assert report.merged == len(adapted_names(model))
    assert report.tensors == len(tensors_of(tmp_path / "out"))


@pytest.mark.parametrize("devices", [1, 8])
def test_bfloat16_tensors_are_the_float32_merge_cast_once(bfloat16, devices, tmp_path):
    model = adapted(bfloat16, dtype=jnp.bfloat16, devices=devices)
    report = dl.save_merged(model, tmp_path / "out")
    base, out = tensors_of(bfloat16.path), tensors_of(tmp_path / "out")
    merge = dl.merge(model)
    names = adapted_names(model)
    assert base.keys() == out.keys() > names.keys()
    for name, value in out.items():
        assert value.dtype == ml_dtypes.bfloat16
        if name not in names:
            assert value.tobytes() == base[name].tobytes()
            continue
        path, layer = names[name]
        adapter = adapters_of(model)[path]
        kernel = merge
        for part in path.split("."):
            kernel = getattr(kernel, part)
        in_memory = np.asarray(kernel.kernel[...])[layer].T
        # A product in other tiles sums in another order, which may decide a tie.
        differ = (ordered(value) != ordered(np.ascontiguousarray(in_memory))).mean()
        assert differ == 0 if devices == 1 else differ < 1e-2, name

        a, b = (np.float64(np.asarray(p[...])[layer]) for p in (adapter.lora_a, adapter.lora_b))
        exact = np.float64(base[name]) + OPTIONS["alpha"] / OPTIONS["rank"] * (a @ b).T
        once = np.float32(exact).astype(ml_dtypes.bfloat16)
        steps = np.abs(ordered(value) - ordered(once))
        assert steps.max() <= 1
        assert (steps > 0).mean() < 1e-2
    assert {name for name, _ in report.rounding} == names.keys()
    losses = [loss for _, loss in report.rounding]
    assert losses == sorted(losses, reverse=True)
    assert 0 < losses[0] < 0.1


def ordered(value: np.ndarray) -> np.ndarray:
    """bfloat16 as integers in the order of the numbers, one apart for neighbours."""
    bits = value.view(np.int16).astype(np.int64)
    return np.where(bits < 0, -1 - (bits & 0x7FFF), bits)


def test_shards_names_and_other_files_are_those_of_the_base(untied, model, tmp_path):
    base = Path(shutil.copytree(untied.path, tmp_path / "base"))
    extra = {"tokenizer.json": "{}", "tokenizer_config.json": '{"a": 1}', "tokenizer.model": "x"}
    extra |= {"special_tokens_map.json": "{}", "chat_template.jinja": "{{ x }}", "LICENSE": "free"}
    for name, text in extra.items():
        (base / name).write_text(text)
    (base / "notes.txt").write_text("not of the model")
    model.source = replace(model.source, folder=base)
    dl.save_merged(model, tmp_path / "out")
    ours, theirs = ({f.name for f in d.iterdir()} for d in (tmp_path / "out", base))
    assert ours == theirs - {"notes.txt"} | {"droplora_merge.json"}
    for name in [*extra, "config.json", "generation_config.json"]:
        assert (tmp_path / "out" / name).read_bytes() == (base / name).read_bytes()
    shards = sorted(base.glob("*.safetensors"))
    assert len(shards) > 1
    for shard in shards:
        with safe_open(shard, "numpy") as a, safe_open(tmp_path / "out" / shard.name, "numpy") as b:
            assert set(a.keys()) == set(b.keys())
            assert b.metadata() == {"format": "pt"}
    a, b = (
        json.loads((d / "model.safetensors.index.json").read_text())
        for d in (base, tmp_path / "out")
    )
    assert a["weight_map"] == b["weight_map"]
    assert a["metadata"]["total_size"] == b["metadata"]["total_size"]


# Merges of `model.layers.1.`: forgotten, of another layer, transposed, or done twice.
WRONG_MERGES = {
    "forgotten": lambda merges, kernel: np.float32(kernel),
    "another layer": lambda merges, kernel: merges[Q_PROJ.of_layer(0)].run(kernel),
    "transposed": lambda merges, kernel: merges[Q_PROJ.of_layer(1)].run(kernel.T).T,
    "twice": lambda merges, kernel: honest(merges, honest(merges, kernel)),
}
NAMES = {parameter.path: parameter.tensor for parameter in PARAMETERS}
Q_PROJ = NAMES["layers.q_proj.kernel"]


def honest(merges, kernel):
    return merges[Q_PROJ.of_layer(1)].run(kernel)


@pytest.fixture(scope="module")
def small(bfloat16) -> nnx.Module:
    """An adapter that does no more than the rounding of bfloat16."""
    return adapted(bfloat16, size=0.05, dtype=jnp.bfloat16)


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_a_small_merge_is_verified(dtype, small, tmp_path):
    assert dl.save_merged(small, tmp_path / "good", dtype=dtype).difference < 1e-5


@pytest.mark.parametrize(
    ("wrong", "dtype"),
    [*((wrong, "bfloat16") for wrong in WRONG_MERGES), ("another layer", "float32")],
)
def test_a_merge_that_computes_something_else_is_not_kept(
    wrong, dtype, small, tmp_path, monkeypatch
):
    """Also in bfloat16, whose rounding is as large as a small adapter."""
    real = merged.merges_by_tensor

    def merges(model):
        right = real(model)
        run = partial(WRONG_MERGES[wrong], right)
        return {**right, Q_PROJ.of_layer(1): merged.Merge(run, transposed=True)}

    monkeypatch.setattr(merged, "merges_by_tensor", merges)
    with pytest.raises(dl.InputError, match="does not compute what base"):
        dl.save_merged(small, tmp_path / "out", dtype=dtype)
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize(("lost", "advised"), [(0.7, True), (1e-3, False)])
def test_a_wider_dtype_is_advised_where_rounding_takes_much(lost, advised, tmp_path):
    report = MergeReport(tmp_path, 9, 1, (("layers.0.q", lost),), 1e-7)
    assert ("--dtype float32" in str(report)) is advised


def test_another_dtype(bfloat16, tmp_path):
    model = adapted(bfloat16)
    dl.save_merged(model, tmp_path / "out", dtype=np.float32)
    assert {t.dtype for t in tensors_of(tmp_path / "out").values()} == {np.dtype(np.float32)}
    config = json.loads((tmp_path / "out" / "config.json").read_text())
    assert config["dtype"] == "float32"
    theirs = AutoModelForCausalLM.from_pretrained(tmp_path / "out")
    assert theirs.dtype == torch.float32
    assert relative(torch_logits(theirs, TOKENS), forward(model, TOKENS)) < 1e-4


def test_masks_do_not_reach_the_files(model, merged_folder, tmp_path):
    graphdef, adapters, keys, frozen = dl.split(model)
    keys = jax.jit(dl.draw)(keys, KEY, rows=np.arange(2))
    dl.save_merged(nnx.merge(graphdef, adapters, keys, frozen), tmp_path / "on")
    for name, value in tensors_of(merged_folder).items():
        np.testing.assert_array_equal(value, tensors_of(tmp_path / "on")[name])


@pytest.mark.parametrize("kind", EXPORTERS)
def test_what_is_there_is_not_touched(kind, model, tmp_path):
    (tmp_path / "out").mkdir()
    (tmp_path / "out" / "mine").write_text("mine")
    with pytest.raises(dl.InputError, match=r"out: exists and is not empty"):
        exporter(kind)(model, tmp_path / "out")
    assert [file.name for file in (tmp_path / "out").iterdir()] == ["mine"]
    assert [file.name for file in tmp_path.iterdir()] == ["out"]


def test_a_disk_full_half_way_leaves_nothing(model, tmp_path, monkeypatch):
    written = []

    def write(writer, name, tensor):
        if len(written) == 5:
            raise OSError(errno.ENOSPC, "No space left on device")
        written.append(name)
        real(writer, name, tensor)

    real = merged.TensorWriter.write
    monkeypatch.setattr(merged.TensorWriter, "write", write)
    with pytest.raises(dl.InputError, match=r"out: could not be written.*No space left on device"):
        dl.save_merged(model, tmp_path / "out")
    assert written
    assert list(tmp_path.iterdir()) == []


@contextmanager
def largest_file(size: int):
    """Writing more than `size` bytes to a file fails, as it does on a full disk."""
    limits = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (size, limits[1]))
    try:
        yield
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, limits)


@pytest.mark.parametrize(("kind", "size"), [("merged", 20_000), ("peft", 2_000)])
def test_a_write_that_the_system_refuses_leaves_nothing(kind, size, model, tmp_path):
    exporter(kind)(model, tmp_path / "compiled")
    with (
        pytest.raises(dl.InputError, match=r"out: could not be written.*File too large"),
        largest_file(size),
    ):
        exporter(kind)(model, tmp_path / "out")
    assert [file.name for file in tmp_path.iterdir()] == ["compiled"]


def changed(model: nnx.Module, change: Callable[[np.ndarray], None]) -> None:
    """Another value of B of v_proj."""
    b = adapters_of(model)["layers.v_proj"].lora_b
    value = np.array(b[...])
    change(value)
    b.set_value(jnp.asarray(value))


@pytest.mark.parametrize(("kind", "value"), [("merged", np.inf), ("peft", np.nan)])
def test_values_that_are_not_finite_are_refused(kind, value, model, tmp_path):
    changed(model, lambda b: b.__setitem__((1, 2, 3), value))
    with pytest.raises(dl.InputError, match=r"layers\.1\.self_attn\.v_proj.*not finite"):
        exporter(kind)(model, tmp_path / "out")
    assert list(tmp_path.iterdir()) == []


def test_values_that_the_stored_dtype_cannot_hold_are_refused(model, tmp_path):
    changed(model, lambda b: np.multiply(b, 1e6, out=b))
    with pytest.raises(dl.InputError, match=r"v_proj.*(not finite|float16)"):
        dl.save_merged(model, tmp_path / "out", dtype=np.float16)
    assert list(tmp_path.iterdir()) == []


def test_a_model_from_no_folder_has_no_base_to_export(model, tmp_path):
    model.source = None
    with pytest.raises(dl.InputError, match="not loaded from a folder"):
        dl.save_merged(model, tmp_path / "out")


@pytest.mark.parametrize("ends", [(), ("embed", "lm_head")], ids=["frozen", "trained"])
def test_what_the_full_precision_of_the_base_changes_is_said(untied, tmp_path, ends):
    int8 = dl.Quantization("int8", tile=16)
    config = dl.DropLoRA(**OPTIONS, targets="paper", train_whole=ends)
    model = randomized(dl.inject(load(untied, quantize=int8), config, key=KEY), size=0.2)
    report = dl.save_merged(model, tmp_path / "merged", trained_over=int8)
    said = float(re.search(r"quantised base with the adapter by (\S+)", str(report))[1])
    tokens = np.random.default_rng(0).integers(0, model.config.vocab_size, (2, 32))
    distance = relative(forward(load(tmp_path / "merged"), tokens), forward(model, tokens))
    assert said == pytest.approx(distance, rel=0.1)
