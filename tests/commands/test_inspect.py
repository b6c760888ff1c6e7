"""What `inspect` says of folders, and adapters truncated to a smaller rank."""

from __future__ import annotations

import json
import shutil

import jax
import jax.numpy as jnp
import numpy as np
import peft
import pytest
import torch
from oracles import random_tokens, randomized, relative, torch_logits
from run_fixtures import contents
from safetensors.numpy import load_file
from transformers import AutoModelForCausalLM

import droplora_jax as dl
from droplora_jax.adapters.truncate import truncated
from droplora_jax.core.sharding import make_mesh

TOKENS = random_tokens(2, 24)
CONFIG = dl.DropLoRA(rank=6, alpha=9.0, rank_pattern={r"\.1\.q_proj": 2}, exclude=(r"\.0\.v_",))


def bad(result) -> str:
    """What a command that refuses its input says."""
    assert result.code == 2
    return result.err


@pytest.fixture(scope="module")
def model(untied):
    mesh = make_mesh(devices=jax.devices()[:1])
    base = dl.load(untied.path, mesh=mesh, dtype=jnp.float32)
    model = randomized(dl.inject(base, CONFIG, key=dl.root_key(0)), size=0.2)
    for adapter in (model.layers.q_proj, model.layers.v_proj):  # padding is zero
        ranks = np.asarray([branch.rank for branch in adapter.branches])[:, None, None]
        there = jnp.asarray(np.arange(adapter.rank) < ranks, jnp.float32)
        adapter.lora_a.set_value(adapter.lora_a[...] * there)
        adapter.lora_b.set_value(adapter.lora_b[...] * jnp.swapaxes(there, -1, -2))
    return model


@pytest.fixture(scope="module")
def adapter(model, tmp_path_factory):
    folder = tmp_path_factory.mktemp("adapter") / "of_ours"
    dl.save_adapter(model, folder, extra={"template": "alpaca"})
    return folder


def deltas(base, adapter) -> dict[str, np.ndarray]:
    """What PEFT adds to each module."""
    plain = AutoModelForCausalLM.from_pretrained(base, dtype=torch.float32)
    before = {name: value.numpy().copy() for name, value in plain.state_dict().items()}
    merged = peft.PeftModel.from_pretrained(plain, adapter).merge_and_unload().state_dict()
    return {
        name.removesuffix(".weight"): value.numpy().astype(np.float64) - before[name]
        for name, value in merged.items()
        if not np.array_equal(value.numpy(), before[name])
    }


def test_an_adapter_layer_by_layer(droplora, untied, adapter):
    out = droplora.good("inspect", adapter, "--json")
    found = json.loads(out)
    assert (found["kind"], found["adapter_kind"], found["rank"]) == ("adapter", "droplora", 6)
    assert found["template"] == "alpaca"
    expected = deltas(untied.path, adapter)
    assert {branch["name"] for branch in found["branches"]} == expected.keys()
    assert len(expected) == 5 * 3 - 1
    for branch in found["branches"]:
        delta = expected[branch["name"]]
        values = np.linalg.svd(delta, compute_uv=False)[: branch["rank"]]
        np.testing.assert_allclose(branch["spectrum"], values, rtol=1e-3)
        assert branch["norm"] == pytest.approx(np.linalg.norm(delta), rel=1e-4)
        assert branch["rank"] == (2 if branch["name"] == "model.layers.1.self_attn.q_proj" else 6)
        assert 1 <= branch["effective_rank"] <= branch["rank"]
        energy = np.cumsum(values**2) / np.sum(values**2)
        assert branch["ranks_for_energy"] == np.argmax(energy >= 0.9) + 1
    out = droplora.good("inspect", adapter)
    for text in ("kind: adapter", "alpha: 9", "q_proj", "6 (2..6)", "█", "vllm: serves it"):
        assert text in out


def test_the_picture(droplora, untied, adapter, tmp_path):
    droplora.good("inspect", adapter, "--png", tmp_path / "map.png")
    assert (tmp_path / "map.png").read_bytes().startswith(b"\x89PNG")
    error = bad(droplora("inspect", adapter, "--png", tmp_path / "map.png"))
    assert "map.png: exists" in error
    error = bad(droplora("inspect", untied.path, "--png", tmp_path / "other.png"))
    assert "a base has no adapter to draw" in error


def test_bases_and_merged_folders(droplora, model, untied, tmp_path):
    dl.save_merged(model, tmp_path / "merged", dtype="bfloat16")
    out = droplora.good("inspect", untied.path, "--json")
    base = json.loads(out)
    out = droplora.good("inspect", tmp_path / "merged", "--json")
    merged = json.loads(out)
    count = sum(p.numel() for p in untied.torch.parameters())
    assert (base["kind"], base["family"]) == ("base", "llama")
    assert base["parameters"] == {"float32": count}
    assert (base["bytes"], merged["bytes"]) == (4 * count, 2 * count)
    assert (merged["kind"], merged["merged_from"]) == ("merged", str(untied.path))
    assert merged["logits_difference"] < 1e-5
    assert "model.layers." in merged["rounding_took_at_most"]


def test_folders_that_are_nothing_or_broken(droplora, adapter, tmp_path):
    for folder, words in {tmp_path: "no model (config.json)", tmp_path / "x": "no such"}.items():
        error = bad(droplora("inspect", folder))
        assert words in error
    broken = shutil.copytree(adapter, tmp_path / "broken")
    file = broken / "adapter_model.safetensors"
    file.write_bytes(file.read_bytes()[:-8])
    error = bad(droplora("inspect", broken))
    assert "adapter_model.safetensors: broken or cut short" in error


@pytest.mark.parametrize("rank", [1, 4])
def test_a_truncated_adapter_is_the_nearest_of_its_rank(droplora, untied, adapter, rank, tmp_path):
    out = droplora.good(
        "export", adapter, "--to", tmp_path / "small", "--format", "peft", "--rank", rank
    )
    whole, small = deltas(untied.path, adapter), deltas(untied.path, tmp_path / "small")
    assert whole.keys() == small.keys()
    kept = there = 0.0
    for name, delta in whole.items():
        u, s, vt = np.linalg.svd(delta, full_matrices=False)
        assert relative(small[name], (u[:, :rank] * s[:rank]) @ vt[:rank]) < 1e-4
        kept, there = kept + np.sum(s[:rank] ** 2), there + np.sum(s**2)
    assert f"rank {rank} keeps {kept / there:.2%} of the adapter's energy" in out
    config = json.loads((tmp_path / "small" / "adapter_config.json").read_text())
    assert (config["r"], config["lora_alpha"]) == (rank, rank)
    assert config["rank_pattern"] == config["alpha_pattern"] == {}
    assert {
        min(t.shape) for t in load_file(tmp_path / "small" / "adapter_model.safetensors").values()
    } == {rank}


def test_dora_keeps_its_magnitudes(untied):
    mesh = make_mesh(devices=jax.devices()[:1])
    base = dl.load(untied.path, mesh=mesh, dtype=jnp.float32)
    model = randomized(dl.inject(base, dl.DoRA(rank=4), key=dl.root_key(0)), size=0.1)
    small, report = truncated(model, 2)
    assert 0.3 < report.worst[1] <= report.kept < 1
    np.testing.assert_array_equal(small.layers.q_proj.magnitude, model.layers.q_proj.magnitude)
    assert small.layers.q_proj.lora_a.shape[-1] == 2


@pytest.mark.parametrize("rank", [0, 6, 7])
def test_a_rank_that_truncates_nothing(droplora, adapter, rank, tmp_path):
    error = bad(
        droplora("export", adapter, "--to", tmp_path / "out", "--format", "peft", "--rank", rank)
    )
    assert f"--rank {rank}: must be at least 1 and below the adapter's rank of 6" in error
    assert list(tmp_path.iterdir()) == []


def test_an_adapter_folder_is_exported_too(droplora, model, untied, adapter, tmp_path):
    out = droplora.good("export", adapter, "--to", tmp_path / "out", "--format", "merged")
    assert "14 of" in out
    theirs = AutoModelForCausalLM.from_pretrained(tmp_path / "out", dtype=torch.float32)
    assert relative(torch_logits(theirs, TOKENS), model(jnp.asarray(TOKENS))) < 1e-5
    out = droplora.good("export", adapter, "--to", tmp_path / "again", "--format", "peft")
    assert "vLLM serves ranks or alphas that differ" in out
    ours, again = (contents(f)["adapter_model.safetensors"] for f in (adapter, tmp_path / "again"))
    assert ours == again


def test_an_adapter_whose_base_has_moved(droplora, untied, adapter, tmp_path):
    moved = shutil.copytree(adapter, tmp_path / "moved")
    file = moved / "adapter_config.json"
    config = json.loads(file.read_text())
    for path, words in {"/no/base": "/no/base': no such folder", "": "give --base"}.items():
        file.write_text(json.dumps(config | {"base_model_name_or_path": path}))
        error = bad(droplora("export", moved, "--to", tmp_path / "o", "--format", "merged"))
        assert words in error
        assert "--base" in error
    droplora.good(
        "export", moved, "--to", tmp_path / "o", "--format", "merged", "--base", untied.path
    )
