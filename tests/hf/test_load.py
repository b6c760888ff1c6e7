"""Hugging Face folders onto a mesh, and what is said about folders that are broken."""

from __future__ import annotations

import json
import os
import shutil
from pathlib import Path

import fsspec
import jax
import jax.numpy as jnp
import ml_dtypes
import numpy as np
import pytest
import torch
from flax import nnx
from oracles import Folder, model_folder, random_tokens, randomized, relative
from safetensors.numpy import load_file, save_file
from small_models import load
from transformers import AutoModelForCausalLM

import droplora_jax as dl
from droplora_jax import cli
from droplora_jax.core.config import MeshConfig
from droplora_jax.core.remote import BucketFile
from droplora_jax.core.sharding import described, make_mesh
from droplora_jax.hf import source
from droplora_jax.models.config import Source
from droplora_jax.models.families import FAMILIES
from droplora_jax.models.families.base import Family, windows
from droplora_jax.models.families.llama import FAMILY
from droplora_jax.models.families.rotary import rope_config


@pytest.fixture
def copy(untied: Folder, tmp_path: Path) -> Path:
    """A copy of the folder that a test may break."""
    return Path(shutil.copytree(untied.path, tmp_path / "copy"))


def edit_config(folder: Path, *without: str, **changes) -> None:
    file = folder / "config.json"
    config = json.loads(file.read_text()) | changes
    file.write_text(json.dumps({k: v for k, v in config.items() if k not in without}))


def adapted(model: nnx.Module) -> nnx.Module:
    """With an adapter of one kind of layer, for which little is compiled."""
    return dl.inject(model, dl.DropLoRA(rank=2, targets="up_proj"), key=dl.root_key(0))


def shards(folder: Path) -> list[Path]:
    return sorted(folder.glob("*.safetensors"))


def shard_of(folder: Path, tensor: str) -> Path:
    index = json.loads((folder / "model.safetensors.index.json").read_text())
    return folder / index["weight_map"][tensor]


def edit_tensors(file: Path, **changes) -> None:
    """Tensors by name with dots as `__`; None removes one."""
    tensors = load_file(file) | {name.replace("__", "."): value for name, value in changes.items()}
    save_file({k: v for k, v in tensors.items() if v is not None}, file, metadata={"format": "pt"})


@pytest.mark.parametrize(
    "config",
    [MeshConfig(), MeshConfig(data=2, fsdp=2, tensor=2), MeshConfig(data=1, fsdp=4, tensor=2)],
)
def test_values_equal_transformers_and_every_device_has_its_part(either, config):
    mesh = make_mesh(config)
    model = load(either, config)
    theirs = either.torch.state_dict()
    names = FAMILY.tensor_names(model.config)
    seen = set()
    for path, parameter in nnx.to_flat_state(nnx.state(model)):
        name, value = names[".".join(path)], parameter[...]
        for layer, ours in enumerate(np.asarray(value if name.stacked else value[None])):
            tensor = theirs[name.of_layer(layer)].numpy()
            np.testing.assert_array_equal(ours.T if name.transposed else ours, tensor)
            seen.add(name.of_layer(layer))
        if "norm" not in ".".join(path):
            part = value.addressable_shards[0].data.size
            assert part * mesh.shape["fsdp"] * mesh.shape["tensor"] == value.size, path
        assert value.sharding.mesh == mesh
    assert seen == {
        n for n in theirs if not (n == "lm_head.weight" and model.config.tie_embeddings)
    }


def test_sizes_that_the_mesh_does_not_divide(tmp_path):
    """One added token, and 9 heads with 3 of keys and values, over 4 x 2 devices."""
    sizes = {"hidden_size": 36, "num_attention_heads": 9, "num_key_value_heads": 3}
    folder = model_folder(tmp_path, vocab_size=65, num_hidden_layers=1, **sizes)
    model = load(folder, MeshConfig(data=1, fsdp=4, tensor=2))
    tokens = random_tokens(8, 12)
    logits = nnx.jit(lambda model, tokens: model(tokens))(model, tokens)
    assert relative(logits, folder.logits(tokens)) < 1e-5


def test_no_mesh_means_every_device_along_fsdp(untied):
    model = dl.load(untied.path)
    kernel = model.layers.q_proj.kernel[...]
    assert described(kernel.sharding.mesh.shape) == "fsdp=8"
    assert kernel.dtype == jnp.bfloat16


@pytest.mark.parametrize("stored", [torch.float32, torch.float16, torch.bfloat16])
def test_one_file_in_any_float_dtype(stored, tmp_path):
    folder = model_folder(tmp_path, dtype=stored, num_hidden_layers=1)
    folder.torch.save_pretrained(tmp_path / "one")
    assert [file.name for file in shards(tmp_path / "one")] == ["model.safetensors"]
    for path in (tmp_path, tmp_path / "one"):
        kernel = np.asarray(load(path).layers.up_proj.kernel[...][0]).T
        expected = folder.torch.model.layers[0].mlp.up_proj.weight.detach().float()
        np.testing.assert_array_equal(kernel, expected)


def test_dtypes_that_are_mixed_come_in_and_go_out_as_they_are(copy, tmp_path):
    kinds = [np.float16, ml_dtypes.bfloat16, np.float32]
    stored = {}
    for i, file in enumerate(shards(copy)):
        tensors = load_file(file)
        stored |= {
            name: t.astype(kinds[(i + j) % 3]) for j, (name, t) in enumerate(tensors.items())
        }
        save_file({name: stored[name] for name in tensors}, file, metadata={"format": "pt"})
    assert {value.dtype for value in stored.values()} == {np.dtype(kind) for kind in kinds}
    model = load(copy)
    for layer in range(3):
        ours = np.asarray(model.layers.up_proj.kernel[...][layer]).T
        theirs = stored[f"model.layers.{layer}.mlp.up_proj.weight"].astype(np.float32)
        np.testing.assert_array_equal(ours, theirs)
    dl.save_merged(adapted(model), tmp_path / "out")  # B is zero: nothing changes
    for file in shards(tmp_path / "out"):
        for name, value in load_file(file).items():
            assert value.dtype == stored[name].dtype
            np.testing.assert_array_equal(value, stored[name])


def test_a_stored_copy_of_tied_embeddings_and_old_buffers_are_no_surprise(tied, tmp_path):
    folder = Path(shutil.copytree(tied.path, tmp_path / "copy"))
    merged = {}
    for file in shards(folder):
        merged |= load_file(file)
        file.unlink()
    (folder / "model.safetensors.index.json").unlink()
    merged["lm_head.weight"] = merged["model.embed_tokens.weight"]
    merged["model.layers.0.self_attn.rotary_emb.inv_freq"] = np.ones(4, np.float32)
    save_file(merged, folder / "model.safetensors", metadata={"format": "pt"})
    assert not hasattr(load(folder), "lm_head")


# Errors: each names the file, the key, and what is wrong.


@pytest.mark.parametrize("path", ["/no/such/folder", "./nowhere", "nowhere", "a/b/c"])
def test_missing_folder(path):
    with pytest.raises(dl.InputError, match=rf"^path='{path}'.*no such folder"):
        load(path)


def test_a_hub_id_that_is_not_to_be_had(monkeypatch, tmp_path):
    monkeypatch.chdir(tmp_path)
    with pytest.raises(dl.InputError, match=r"^path='nobody/nothing'.*hub"):
        load("nobody/nothing")


def test_a_file_in_place_of_a_folder(copy):
    with pytest.raises(dl.InputError, match=r"config\.json"):
        load(copy / "config.json")


def test_config_missing(copy):
    (copy / "config.json").unlink()
    with pytest.raises(dl.InputError, match=r"copy/config\.json: missing"):
        load(copy)


@pytest.mark.parametrize("text", ["{", "[]", "\xff"])
def test_config_that_is_no_json_object(copy, text):
    (copy / "config.json").write_bytes(text.encode("latin1"))
    with pytest.raises(dl.InputError, match=r"copy/config\.json: (not valid JSON|holds list)"):
        load(copy)


@pytest.mark.parametrize("model_type", ["gemma", None])
def test_model_type(copy, model_type):
    edit_config(copy, model_type=model_type)
    message = rf"config\.json: model_type={model_type!r}.*supported: {', '.join(FAMILIES)}"
    with pytest.raises(dl.InputError, match=message):
        load(copy)


def test_an_unknown_key_and_the_way_out(copy):
    edit_config(copy, attention_scaling=2.0)
    with pytest.raises(
        dl.InputError,
        match=r'config\.json.*attention_scaling.*2\.0.*ignore_config_keys=\["attention_scaling"\]',
    ):
        load(copy)
    assert load(copy, ignore_config_keys=["attention_scaling"])


def test_a_refused_value(copy):
    edit_config(copy, hidden_act="gelu")
    with pytest.raises(dl.InputError, match=r"config\.json: hidden_act='gelu'.*supported: 'silu'"):
        load(copy)


@pytest.mark.parametrize("key", ["hidden_size", "num_attention_heads", "vocab_size"])
def test_a_missing_key(copy, key):
    edit_config(copy, key)
    with pytest.raises(dl.InputError, match=rf"config\.json: lacks the key '{key}'"):
        load(copy)


@pytest.mark.parametrize(
    ("key", "value"),
    [
        ("hidden_size", None),
        ("num_hidden_layers", "three"),
        ("rms_norm_eps", None),
        ("vocab_size", -4),
    ],
)
def test_a_value_of_the_wrong_kind(copy, key, value):
    edit_config(copy, **{key: value})
    with pytest.raises(dl.InputError, match=rf"config\.json.*{key}"):
        load(copy)


@pytest.mark.parametrize(
    ("parameters", "message"),
    [
        ({"rope_type": "longrope", "rope_theta": 1e4}, "'longrope'.*supported: default, linear"),
        ({"rope_type": "yarn", "rope_theta": 1e4}, "'yarn' lacks factor"),
        ({"rope_type": "dynamic", "rope_theta": 1e4, "factor": -2.0}, r"factor=-2\.0"),
        ({"rope_type": "linear", "rope_theta": 1e4}, "'linear' lacks factor"),
        (
            {"rope_type": "linear", "rope_theta": 1e4, "factor": 2.0, "beta": 1.0},
            "'linear' has unknown keys beta",
        ),
        ({"rope_type": "linear", "rope_theta": 1e4, "factor": "two"}, "factor='two'"),
    ],
)
def test_rotary_settings(copy, parameters, message):
    edit_config(copy, rope_parameters=parameters)
    with pytest.raises(dl.InputError, match=rf"copy/config\.json.*{message}"):
        load(copy)


@pytest.mark.parametrize("first", [None, -1, 1.5, True])
def test_windows_from_a_layer_that_is_none(first):
    hf = {"num_hidden_layers": 2, "use_sliding_window": True, "max_window_layers": first}
    with pytest.raises(dl.InputError, match=rf"max_window_layers={first}: must be a whole number"):
        windows(hf)


def test_rotary_settings_default_to_the_first_llama():
    assert rope_config({}) == rope_config({"rope_scaling": None, "rope_theta": 1e4})


def test_pickled_weights_only(copy):
    for file in [*shards(copy), copy / "model.safetensors.index.json"]:
        file.unlink()
    (copy / "pytorch_model.bin").write_bytes(b"")
    with pytest.raises(dl.InputError, match=r"pickled.*pytorch_model\.bin.*save_pretrained"):
        load(copy)


def test_no_weights_at_all(copy):
    for file in [*shards(copy), copy / "model.safetensors.index.json"]:
        file.unlink()
    with pytest.raises(dl.InputError, match=r"copy: neither model\.safetensors nor"):
        load(copy)


@pytest.mark.parametrize("size", [0, 5, -100])
def test_a_shard_that_is_cut_short(copy, size):
    file = shards(copy)[1]
    file.write_bytes(file.read_bytes()[:size])
    with pytest.raises(dl.InputError, match=rf"{file.name}: broken or cut short.*again"):
        load(copy)


def test_a_shard_that_the_index_names_and_that_is_missing(copy):
    file = shards(copy)[1]
    file.unlink()
    with pytest.raises(dl.InputError, match=rf"{file.name}: missing"):
        load(copy)


@pytest.mark.parametrize("text", ["{}", '{"weight_map": []}'])
def test_an_index_without_a_table(copy, text):
    (copy / "model.safetensors.index.json").write_text(text)
    with pytest.raises(dl.InputError, match=r"model\.safetensors\.index\.json.*weight_map"):
        load(copy)


TENSOR = "model.layers.1.mlp.up_proj.weight"


def test_a_missing_tensor(copy):
    file = copy / "model.safetensors.index.json"
    index = json.loads(file.read_text())
    del index["weight_map"][TENSOR]
    file.write_text(json.dumps(index))
    shard = next(file for file in shards(copy) if TENSOR in load_file(file))
    with pytest.raises(dl.InputError, match=rf"{shard.name}: holds {TENSOR}, which is not listed"):
        load(copy)
    edit_tensors(shard, **{TENSOR.replace(".", "__"): None})
    with pytest.raises(dl.InputError, match=rf"copy: 1 tensor\(s\) missing, such as {TENSOR}"):
        load(copy)


def test_a_tensor_in_two_shards(copy):
    file = shard_of(copy, TENSOR)
    other = next(shard for shard in shards(copy) if shard != file)
    edit_tensors(other, **{TENSOR.replace(".", "__"): np.zeros((48, 32), np.float32)})
    message = rf"{other.name}: holds {TENSOR}, which is in {file.name} by .*index\.json"
    with pytest.raises(dl.InputError, match=message):
        load(copy)


@pytest.mark.parametrize("file", ["../outside.safetensors", "/etc/passwd", 3])
def test_an_index_that_names_a_file_elsewhere(copy, file):
    path = copy / "model.safetensors.index.json"
    index = json.loads(path.read_text())
    index["weight_map"][TENSOR] = file
    path.write_text(json.dumps(index))
    with pytest.raises(dl.InputError, match=rf"index\.json: names the file {file!r}"):
        load(copy)


@pytest.mark.parametrize("value", [np.nan, np.inf, -np.inf])
def test_a_value_that_is_not_finite(copy, value):
    file = shard_of(copy, TENSOR)
    wrong = np.zeros((48, 32), np.float32)
    wrong[47, 31] = value
    edit_tensors(file, **{TENSOR.replace(".", "__"): wrong})
    with pytest.raises(dl.InputError, match=rf"{file.name}: {TENSOR} holds NaN or infinity"):
        load(copy)


@pytest.mark.parametrize("name", ["config.json", "model-00001-of-00003.safetensors"])
def test_a_link_that_leads_outside_the_folder(copy, tmp_path, name):
    name = name if name == "config.json" else shards(copy)[0].name
    (copy / name).rename(tmp_path / "elsewhere")
    (copy / name).symlink_to(tmp_path / "elsewhere")
    with pytest.raises(dl.InputError, match=rf"{name}: a link to .*elsewhere.*Copy the file"):
        load(copy)
    (copy / name).unlink()
    (tmp_path / "elsewhere").rename(copy / "within")
    (copy / name).symlink_to(copy / "within")
    load(copy)


def test_links_into_a_hub_cache_are_followed(copy, tmp_path):
    """Some versions of huggingface_hub put them into a folder that was asked for."""
    blobs = tmp_path / "hub" / "models--owner--name" / "blobs"
    blobs.mkdir(parents=True)
    for file in shards(copy):
        file.rename(blobs / file.name)
        file.symlink_to(blobs / file.name)
    assert load(copy)


def one_file(folder: Path, **changed: np.ndarray) -> dict[str, np.ndarray]:
    """All shards of a folder as `model.safetensors`, beside them."""
    tensors: dict[str, np.ndarray] = {}
    for file in shards(folder):
        tensors |= load_file(file)
    tensors |= {name.replace("__", "."): value for name, value in changed.items()}
    save_file(tensors, folder / "model.safetensors", metadata={"format": "pt"})
    return tensors


def test_an_index_without_its_shards_is_a_leftover(copy, tmp_path):
    old = shards(copy)
    one_file(copy, model__norm__weight=np.full(32, 2.0, np.float32))
    for file in old:
        file.unlink()
    theirs = AutoModelForCausalLM.from_pretrained(copy, dtype=torch.float32)
    model = load(copy)
    np.testing.assert_array_equal(model.final_norm.scale[...], theirs.model.norm.weight.detach())
    assert float(model.final_norm.scale[...][0]) == 2.0
    dl.save_merged(adapted(model), tmp_path / "out")
    assert [file.name for file in shards(tmp_path / "out")] == ["model.safetensors"]
    assert not (tmp_path / "out" / "model.safetensors.index.json").exists()


def test_the_weights_of_two_models(copy):
    first = shards(copy)[0]
    one_file(copy)
    os.utime(copy / "model.safetensors", (1, 1))
    message = rf"model\.safetensors and the shards of .*such as {first.name}: two models \(model-0"
    with pytest.raises(dl.InputError, match=message):
        load(copy)


# The hub, as its cache is on a machine that is offline, and buckets.


@pytest.fixture
def cached(untied, tmp_path, monkeypatch):
    """huggingface_hub's cache with two commits of one model, as it lies on the disk."""
    repository = tmp_path / "models--owner--name"
    for commit, scale in {"a" * 40: 1.0, "b" * 40: 2.0}.items():
        snapshot = repository / "snapshots" / commit
        snapshot.mkdir(parents=True)
        for file in untied.path.iterdir():
            blob = repository / "blobs" / f"{commit[0]}-{file.name}"
            blob.parent.mkdir(exist_ok=True)
            shutil.copy(file, blob)
            (snapshot / file.name).symlink_to(f"../../blobs/{blob.name}")
        norm = shard_of(snapshot, "model.norm.weight").resolve()
        edit_tensors(norm, model__norm__weight=np.full(32, scale, np.float32))
    (repository / "refs").mkdir()
    (repository / "refs" / "main").write_text("b" * 40)
    (repository / "refs" / "old").write_text("a" * 40)
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_CACHE", str(tmp_path))
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", True)
    return repository


@pytest.mark.parametrize(
    ("revision", "commit", "scale"),
    [(None, "b", 2), ("main", "b", 2), ("old", "a", 1), ("a" * 40, "a", 1)],
)
def test_a_hub_id_offline_and_pinned(cached, revision, commit, scale):
    model = dl.load("owner/name", dtype=jnp.float32, revision=revision)
    assert float(model.final_norm.scale[0]) == scale
    # The commit, not the name that may move on.
    snapshot = cached / "snapshots" / (commit * 40)
    assert model.source == Source("owner/name", snapshot, commit * 40)
    (cached / "refs" / "main").write_text("a" * 40)
    assert source.source_folder(model).name == commit * 40


def test_an_adapter_names_the_commit_of_its_base(cached, tmp_path):
    """So that it is merged into the base that it was trained on, wherever the branch is by then."""
    model = dl.load("owner/name", dtype=jnp.float32, revision="old")
    dl.save_adapter(adapted(model), tmp_path / "adapter")
    named = json.loads((tmp_path / "adapter" / "adapter_config.json").read_text())
    assert (named["base_model_name_or_path"], named["revision"]) == ("owner/name", "a" * 40)
    arguments = ["export", str(tmp_path / "adapter"), "--to", str(tmp_path / "out")]
    assert cli.main([*arguments, "--format", "merged"]) == 0
    norm = load_file(shard_of(tmp_path / "out", "model.norm.weight"))["model.norm.weight"]
    assert set(norm) == {1.0}  # `main` has 2.0


def test_a_revision_that_is_not_in_the_cache(cached):
    with pytest.raises(dl.InputError, match=r"owner/name.*not to be had from the hub"):
        dl.load("owner/name", revision="other")


@pytest.fixture
def bucket(untied, tmp_path, monkeypatch):
    """A bucket in memory, and a home for what is fetched of it."""
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    memory = fsspec.filesystem("memory")
    for file in untied.path.iterdir():
        memory.pipe_file(f"/models/tiny/{file.name}", file.read_bytes())
    yield "memory://models/tiny"
    memory.rm("/models", recursive=True)


def test_a_bucket_is_read_by_ranges(untied, bucket, tmp_path, monkeypatch):
    requests = []
    real = BucketFile.range

    def range_(self, start, stop):
        requests.append((self._path, stop - start))
        return real(self, start, stop)

    monkeypatch.setattr(BucketFile, "range", range_)
    theirs, ours = (dl.load(path, dtype=jnp.float32) for path in (untied.path, bucket))
    for a, b in zip(*(jax.tree.leaves(nnx.state(x)) for x in (theirs, ours)), strict=True):
        np.testing.assert_array_equal(a, b)
        assert a.sharding == b.sharding
    sizes = {shard: file.stat().st_size for file in shards(untied.path) for shard in [file.name]}
    for path, size in requests:
        assert size < sizes[path.rsplit("/", 1)[-1]]
    fetched = {file.name for file in (tmp_path / "cache").rglob("*") if file.is_file()}
    assert not any(name.endswith(".safetensors") for name in fetched)

    dl.save_merged(randomized(adapted(ours), size=0.1), tmp_path / "out")
    assert {file.name for file in shards(tmp_path / "out")} == sizes.keys()


def test_buckets_that_cannot_be_read(bucket):
    with pytest.raises(dl.InputError, match=r"memory://models/none: can't be read"):
        dl.load("memory://models/none")
    with pytest.raises(dl.InputError, match=r"gs://b/m: needs gcsfs: pip install gcsfs"):
        dl.load("gs://b/m")
    with pytest.raises(dl.InputError, match=r"no://b/m: .*[Pp]rotocol"):
        dl.load("no://b/m")


def test_a_tensor_that_its_shard_does_not_hold(copy):
    file = shard_of(copy, TENSOR)
    edit_tensors(file, **{TENSOR.replace(".", "__"): None})
    with pytest.raises(dl.InputError, match=rf"{file.name}: does not hold {TENSOR}"):
        load(copy)


def test_a_tensor_too_many(copy):
    file = copy / "model.safetensors.index.json"
    index = json.loads(file.read_text())
    index["weight_map"]["model.layers.0.mlp.up_proj.bias"] = shards(copy)[0].name
    file.write_text(json.dumps(index))
    edit_tensors(shards(copy)[0], model__layers__0__mlp__up_proj__bias=np.zeros(48, np.float32))
    with pytest.raises(dl.InputError, match=r"\.safetensors: tensor .*up_proj\.bias has no place"):
        load(copy)


def test_fewer_layers_in_the_configuration_than_in_the_weights(copy):
    edit_config(copy, num_hidden_layers=2)
    with pytest.raises(dl.InputError, match=r"model\.layers\.2\..* has no place"):
        load(copy)


def test_a_wrong_shape(copy):
    file = shard_of(copy, TENSOR)
    edit_tensors(file, **{TENSOR.replace(".", "__"): np.zeros((48, 31), np.float32)})
    with pytest.raises(dl.InputError, match=rf"{file.name}: {TENSOR}.*\[48, 31\].*\[48, 32\]"):
        load(copy)


@pytest.mark.parametrize("dtype", [np.int8, ml_dtypes.float8_e4m3fn])
def test_a_stored_dtype_that_is_not_read(copy, dtype):
    file = shard_of(copy, TENSOR)
    edit_tensors(file, **{TENSOR.replace(".", "__"): np.zeros((48, 32), np.float32).astype(dtype)})
    with pytest.raises(dl.InputError, match=rf"{file.name}: {TENSOR} is stored as (I8|F8)"):
        load(copy)


def test_the_source_holds_in_any_working_directory(untied, monkeypatch):
    monkeypatch.chdir(untied.path.parent)
    model = load(Path(untied.path.name))
    monkeypatch.chdir("/")
    assert source.source_folder(model) == untied.path.resolve()


def test_every_family_accounts_for_its_keys_once():
    for family in FAMILIES.values():
        assert isinstance(family, Family)
        groups = [family.read, family.harmless, frozenset(family.neutral)]
        assert sum(map(len, groups)) == len(frozenset().union(*groups))
