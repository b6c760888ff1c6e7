"""Folders that transformers and PEFT load, and adapters that come back."""

from __future__ import annotations

import dataclasses
import errno
import json
import resource
import shutil
from contextlib import contextmanager
from functools import partial
from pathlib import Path

import jax
import jax.numpy as jnp
import ml_dtypes
import numpy as np
import peft
import pytest
import torch
from flax import nnx
from oracles import (
    Folder,
    assert_unchanged,
    random_tokens,
    randomized,
    relative,
    snapshot,
    torch_logits,
)
from safetensors import safe_open
from safetensors.numpy import load_file
from transformers import AutoModelForCausalLM

import droplora_jax as dl
from droplora_jax.adapters.surgery import adapters_of
from droplora_jax.core.sharding import make_mesh
from droplora_jax.hf import EXPORTERS, merged
from droplora_jax.hf.exporter import exporter
from droplora_jax.models.parameters import PARAMETERS

KEY = dl.root_key(0)
TOKENS = random_tokens(2, 80)
OPTIONS = {"rank": 4, "alpha": 6.0}


@nnx.jit
def forward(model, tokens):
    return model(tokens)


def adapted(folder: Path, dtype=jnp.float32, devices: int = 8, **options) -> nnx.Module:
    config = dl.DropLoRA(**{**OPTIONS, **options})
    mesh = make_mesh(devices=jax.devices()[:devices])
    return randomized(dl.inject(dl.load(folder, mesh=mesh, dtype=dtype), config, key=KEY), size=0.2)


def plain(folder: Path) -> nnx.Module:
    return dl.load(folder, mesh=make_mesh(devices=jax.devices()[:1]), dtype=jnp.float32)


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


@pytest.fixture
def model(untied: Folder) -> nnx.Module:
    return adapted(untied.path, devices=1)


# A merged folder.


@pytest.mark.parametrize("targets", ["paper", "all-linear"])
def test_transformers_loads_the_merged_folder(either, targets, tmp_path):
    model = adapted(either.path, targets=targets)
    report = dl.save_merged(model, tmp_path / "out")
    theirs = AutoModelForCausalLM.from_pretrained(tmp_path / "out", dtype=torch.float32)
    logits = forward(model, TOKENS)
    assert relative(torch_logits(theirs, TOKENS), logits) < 1e-4
    assert relative(either.logits(TOKENS), logits) > 0.1
    assert relative(forward(dl.load(tmp_path / "out", dtype=jnp.float32), TOKENS), logits) < 1e-5
    assert report.merged == len(adapted_names(model))
    assert report.tensors == len(tensors_of(tmp_path / "out"))


@pytest.mark.parametrize("devices", [1, 8])
def test_bfloat16_tensors_are_the_float32_merge_cast_once(bfloat16, devices, tmp_path):
    model = adapted(bfloat16.path, jnp.bfloat16, devices)
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
        in_memory = np.asarray(kernel.kernel[...][layer]).T
        # A product in other tiles sums in another order, which may decide a tie.
        differ = (ordered(value) != ordered(np.ascontiguousarray(in_memory))).mean()
        assert differ == 0 if devices == 1 else differ < 1e-2, name

        a, b = (np.float64(p[...][layer]) for p in (adapter.lora_a, adapter.lora_b))
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


def test_shards_names_and_other_files_are_those_of_the_base(untied, tmp_path):
    base = Path(shutil.copytree(untied.path, tmp_path / "base"))
    extra = {"tokenizer.json": "{}", "tokenizer_config.json": '{"a": 1}', "tokenizer.model": "x"}
    extra |= {"special_tokens_map.json": "{}", "chat_template.jinja": "{{ x }}", "LICENSE": "free"}
    for name, text in extra.items():
        (base / name).write_text(text)
    (base / "notes.txt").write_text("not of the model")
    dl.save_merged(adapted(base), tmp_path / "out")
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


@pytest.mark.parametrize("wrong", WRONG_MERGES)
@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_a_merge_that_computes_something_else_is_not_kept(
    wrong, dtype, bfloat16, tmp_path, monkeypatch
):
    """Also in bfloat16, whose rounding is as large as a small adapter."""
    model = adapted(bfloat16.path, jnp.bfloat16)
    for adapter in adapters_of(model).values():
        adapter.lora_b[...] *= 0.05
    real = merged.merges_by_tensor

    def merges(model):
        right = real(model)
        run = partial(WRONG_MERGES[wrong], right)
        return {**right, Q_PROJ.of_layer(1): merged.Merge(run, transposed=True)}

    assert dl.save_merged(model, tmp_path / "good", dtype=dtype).difference < 1e-5
    monkeypatch.setattr(merged, "merges_by_tensor", merges)
    with pytest.raises(dl.InputError, match="does not compute what base"):
        dl.save_merged(model, tmp_path / "out", dtype=dtype)
    assert [path.name for path in tmp_path.iterdir()] == ["good"]


def test_another_dtype(bfloat16, tmp_path):
    model = adapted(bfloat16.path)
    dl.save_merged(model, tmp_path / "out", dtype=np.float32)
    assert {t.dtype for t in tensors_of(tmp_path / "out").values()} == {np.dtype(np.float32)}
    config = json.loads((tmp_path / "out" / "config.json").read_text())
    assert config["dtype"] == "float32"
    theirs = AutoModelForCausalLM.from_pretrained(tmp_path / "out")
    assert theirs.dtype == torch.float32
    assert relative(torch_logits(theirs, TOKENS), forward(model, TOKENS)) < 1e-4


def test_masks_do_not_reach_the_files(model, tmp_path):
    dl.save_merged(model, tmp_path / "off")
    dl.save_merged(dl.masked(model, KEY, rows=jnp.arange(2)), tmp_path / "on")
    for name, value in tensors_of(tmp_path / "off").items():
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


@pytest.mark.parametrize("value", [np.nan, np.inf])
@pytest.mark.parametrize("kind", EXPORTERS)
def test_values_that_are_not_finite_are_refused(kind, value, model, tmp_path):
    b = adapters_of(model)["layers.v_proj"].lora_b
    b.set_value(b[...].at[1, 2, 3].set(value))
    with pytest.raises(dl.InputError, match=r"layers\.1\.self_attn\.v_proj.*not finite"):
        exporter(kind)(model, tmp_path / "out")
    assert list(tmp_path.iterdir()) == []


def test_values_that_the_stored_dtype_cannot_hold_are_refused(model, tmp_path):
    b = adapters_of(model)["layers.v_proj"].lora_b
    b.set_value(b[...] * 1e6)
    with pytest.raises(dl.InputError, match=r"v_proj.*(not finite|float16)"):
        dl.save_merged(model, tmp_path / "out", dtype=np.float16)
    assert list(tmp_path.iterdir()) == []


def test_a_model_from_no_folder_has_no_base_to_export(model, tmp_path):
    model.source = None
    with pytest.raises(dl.InputError, match="not loaded from a folder"):
        dl.save_merged(model, tmp_path / "out")


# A PEFT folder.


def in_peft(base: Path, adapter: Path) -> peft.PeftModel:
    model = AutoModelForCausalLM.from_pretrained(base, dtype=torch.float32)
    return peft.PeftModel.from_pretrained(model, adapter).eval()


@pytest.mark.parametrize("targets", ["paper", "all-linear"])
def test_peft_loads_the_adapter(either, targets, tmp_path):
    model = adapted(either.path, targets=targets)
    dl.save_adapter(model, tmp_path / "out")
    theirs = in_peft(either.path, tmp_path / "out")
    assert relative(torch_logits(theirs, TOKENS), forward(model, TOKENS)) < 1e-4
    # Nothing of it was left unused, and nothing is missing.
    stored = load_file(tmp_path / "out" / "adapter_model.safetensors")
    assert stored.keys() == peft.get_peft_model_state_dict(theirs).keys()
    assert {tensor.dtype for tensor in stored.values()} == {np.dtype(np.float32)}
    # The two exports are one function.
    dl.save_merged(model, tmp_path / "merged")
    own = theirs.merge_and_unload().state_dict()
    for name, value in tensors_of(tmp_path / "merged").items():
        assert relative(value, own[name]) < 1e-6


def test_the_files_say_what_they_are(model, untied, tmp_path):
    dl.save_adapter(model, tmp_path / "out", extra={"template": "alpaca"})
    config = json.loads((tmp_path / "out" / "adapter_config.json").read_text())
    assert config["base_model_name_or_path"] == str(untied.path.resolve())
    assert (config["peft_type"], config["r"], config["lora_alpha"]) == ("LORA", 4, 6)
    assert config["target_modules"] == ["down_proj", "k_proj", "q_proj", "up_proj", "v_proj"]
    assert config["inference_mode"] is True
    known = {field.name for field in dataclasses.fields(peft.LoraConfig)}
    assert config.keys() <= known  # PEFT warns about others
    own = json.loads((tmp_path / "out" / "droplora_config.json").read_text())
    assert own["drop_rate"] == 0.5
    assert own["template"] == "alpaca"


ALL_OPTIONS = [
    {},
    {"drop_rate": 0.25, "granularity": "step", "sampler": "exact", "rescale": False},
    {"alpha": 0.3, "drop_rate": 0.0, "targets": ("q_proj", "down_proj$")},
]


@pytest.mark.parametrize("options", ALL_OPTIONS, ids=str)
def test_export_and_import_are_bit_identical_options_included(untied, options, tmp_path):
    model = adapted(untied.path, **options)
    dl.save_adapter(model, tmp_path / "out")
    base = dl.load(untied.path, dtype=jnp.float32)
    before = snapshot(base)
    back = dl.load_adapter(base, tmp_path / "out")
    assert_unchanged(base, before)
    ours, theirs = adapters_of(model), adapters_of(back)
    assert ours.keys() == theirs.keys()
    for path, adapter in ours.items():
        assert theirs[path].config == adapter.config == dl.DropLoRA(**{**OPTIONS, **options})
        for name in ("lora_a", "lora_b"):
            a, b = (getattr(x, name).get_value() for x in (adapter, theirs[path]))
            np.testing.assert_array_equal(a, b)
            assert a.sharding.is_equivalent_to(b.sharding, a.ndim)
    np.testing.assert_array_equal(forward(back, TOKENS), forward(model, TOKENS))


def test_loading_into_a_model_with_adapters_leaves_that_model_alone(untied, model, tmp_path):
    dl.save_adapter(model, tmp_path / "out")
    other = dl.inject(plain(untied.path), dl.DropLoRA(**OPTIONS), key=KEY)
    before = snapshot(other)
    loaded = dl.load_adapter(other, tmp_path / "out")
    np.testing.assert_array_equal(forward(loaded, TOKENS), forward(model, TOKENS))
    assert_unchanged(other, before)


@pytest.mark.parametrize("through", ["config", "model"])
def test_another_scale_than_the_adapter_was_trained_with_is_refused(
    untied, model, through, tmp_path
):
    """It would be another function, silently."""
    dl.save_adapter(model, tmp_path / "out")
    config = dl.DropLoRA(rank=4, alpha=12.0)
    base = plain(untied.path)
    options = {"config": config} if through == "config" else {}
    if through == "model":
        base = dl.inject(base, config, key=KEY)
    with pytest.raises(dl.InputError, match=r"lora_alpha=6.*12"):
        dl.load_adapter(base, tmp_path / "out", **options)


def test_other_training_options_may_be_given(untied, model, tmp_path):
    dl.save_adapter(model, tmp_path / "out")
    config = dl.DropLoRA(**OPTIONS, drop_rate=0.1, granularity="step")
    loaded = dl.load_adapter(plain(untied.path), tmp_path / "out", config=config)
    assert {adapter.config for adapter in adapters_of(loaded).values()} == {config}
    np.testing.assert_array_equal(forward(loaded, TOKENS), forward(model, TOKENS))


@pytest.fixture(scope="module")
def trained_by_peft(untied, tmp_path_factory) -> tuple[Path, np.ndarray]:
    """A plain LoRA that PEFT trained for two steps and saved, and its logits."""
    with torch.random.fork_rng():
        torch.manual_seed(1)
        theirs = peft.get_peft_model(
            AutoModelForCausalLM.from_pretrained(untied.path, dtype=torch.float32),
            peft.LoraConfig(r=3, lora_alpha=5, target_modules=["q_proj", "o_proj", "gate_proj"]),
        )
        optimizer = torch.optim.AdamW(theirs.parameters(), lr=0.05)
        batch = torch.tensor(TOKENS, dtype=torch.long)
        for _ in range(2):
            theirs(batch, labels=batch).loss.backward()
            optimizer.step()
            optimizer.zero_grad()
    path = tmp_path_factory.mktemp("trained_by_peft")
    theirs.save_pretrained(path)
    return path, torch_logits(theirs.eval(), TOKENS)


def test_an_adapter_that_peft_trained(untied, trained_by_peft):
    path, expected = trained_by_peft
    base = plain(untied.path)
    model = dl.load_adapter(base, path)
    assert relative(forward(base, TOKENS), expected) > 1e-2
    assert relative(forward(model, TOKENS), expected) < 1e-4
    assert {adapter.config.drop_rate for adapter in adapters_of(model).values()} == {0.0}


UNSUPPORTED = {
    "peft_type": "IA3",
    "bias": "some",
    "fan_in_fan_out": True,
    "modules_to_save": ["lm_head"],
    "layer_replication": [[0, 2]],
    "trainable_token_indices": [1],
    "target_parameters": ["x"],
    "lora_bias": True,
    "use_qalora": True,
    # These change the base, or what is computed, and PEFT applies them on loading.
    "init_lora_weights": "pissa",
    "alora_invocation_tokens": [1],
    "use_bdlora": {"x": 1},
    "arrow_config": {"x": 1},
    "kasa_config": {"x": 1},
    "monteclora_config": {"x": 1},
    "a_field_of_the_future": 1,
}


@pytest.mark.parametrize("field", UNSUPPORTED)
def test_fields_that_are_not_understood_are_named(field, untied, trained_by_peft, tmp_path):
    folder = Path(shutil.copytree(trained_by_peft[0], tmp_path / "adapter"))
    config = json.loads((folder / "adapter_config.json").read_text())
    config[field] = UNSUPPORTED[field]
    (folder / "adapter_config.json").write_text(json.dumps(config))
    with pytest.raises(dl.InputError, match=rf"adapter_config\.json.*{field}"):
        dl.load_adapter(plain(untied.path), folder)


@pytest.mark.parametrize("field", ["r", "lora_alpha", "peft_type"])
def test_fields_that_are_missing_are_named(field, untied, trained_by_peft, tmp_path):
    folder = Path(shutil.copytree(trained_by_peft[0], tmp_path / "adapter"))
    config = json.loads((folder / "adapter_config.json").read_text())
    del config[field]
    (folder / "adapter_config.json").write_text(json.dumps(config))
    with pytest.raises(dl.InputError, match=rf"adapter_config\.json.*{field}"):
        dl.load_adapter(plain(untied.path), folder)


def test_an_adapter_of_another_base_or_a_folder_without_one(untied, model, tmp_path):
    base = plain(untied.path)
    with pytest.raises(dl.InputError, match=r"adapter_config\.json: missing"):
        dl.load_adapter(base, tmp_path)
    dl.save_adapter(model, tmp_path / "out")
    other = dl.inject(base, dl.DropLoRA(**OPTIONS, targets="q_proj"), key=KEY)
    with pytest.raises(dl.InputError, match=r"adapter_model\.safetensors.*no place"):
        dl.load_adapter(other, tmp_path / "out")
    more = dl.inject(base, dl.DropLoRA(**OPTIONS, targets="all-linear"), key=KEY)
    with pytest.raises(dl.InputError, match=r"adapter_model\.safetensors: lacks .*(gate|o)_proj"):
        dl.load_adapter(more, tmp_path / "out")
    rank = dl.inject(base, dl.DropLoRA(rank=8, alpha=12.0), key=KEY)
    with pytest.raises(dl.InputError, match=r"\[4, \d+\].*\[8, \d+\]|r=4"):
        dl.load_adapter(rank, tmp_path / "out")


def test_no_adapters_nothing_to_save(untied, tmp_path):
    with pytest.raises(dl.InputError, match="no adapters"):
        dl.save_adapter(dl.load(untied.path), tmp_path / "out")


def test_an_old_adapter_is_replaced_only_when_asked(model, tmp_path):
    dl.save_adapter(model, tmp_path / "out")
    with pytest.raises(dl.InputError, match="exists"):
        dl.save_adapter(model, tmp_path / "out")
    dl.save_adapter(randomized(model, seed=1), tmp_path / "out", replace=True)
    stored = load_file(tmp_path / "out" / "adapter_model.safetensors")
    a = adapters_of(randomized(model, seed=1))["layers.q_proj"].lora_a[...]
    name = "base_model.model.model.layers.2.self_attn.q_proj.lora_A.weight"
    np.testing.assert_array_equal(stored[name].T, jax.device_get(a)[2])
