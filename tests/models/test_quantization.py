"""Which kernels are quantised, what a base then takes of memory, and runs on such a base."""

from __future__ import annotations

import json
import shutil
import sys

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx
from oracles import Folder, relative
from run_fixtures import VOCAB, adapter_bytes, metrics, write_run

import droplora_jax as dl
from droplora_jax.core.errors import InputError
from droplora_jax.core.sharding import make_mesh
from droplora_jax.hf.base import Base
from droplora_jax.inference.decode import better_apart
from droplora_jax.nn.quantized_kernel import Quantized
from droplora_jax.runs import config_reader
from droplora_jax.runs.open_model import open_model
from droplora_jax.runs.planning.hardware import topology
from droplora_jax.runs.planning.plan import plan

TILE = 16
SHORT = ("--max-new-tokens", 4)
QUANTIZED = {"quantize": "nf4", "quantize_tile": TILE}


def load(folder: Folder, kind: str = "nf4", **pattern: str) -> nnx.Module:
    return dl.load(folder.path, quantize=dl.Quantization(kind, TILE, pattern))


def kinds(model: nnx.Module) -> dict[str, str]:
    found = {}
    for path, variable in nnx.to_flat_state(nnx.state(model)):
        if isinstance(variable.get_value(), Quantized):
            found[path[1]] = variable.get_value().kind
    return found


# Which.


def test_kinds_by_pattern(untied):
    rest = dict.fromkeys(("q_proj", "k_proj", "v_proj", "gate_proj", "up_proj"), "nf4")
    found = kinds(load(untied, **{"down": "int8", "o_proj$": "none"}))
    assert found == rest | {"down_proj": "int8"}
    assert kinds(load(untied, "none")) == {}
    assert kinds(load(untied, "none", up="int4")) == {"up_proj": "int4"}


LLAMA_8B = {
    "model_type": "llama",
    "vocab_size": 128256,
    "hidden_size": 4096,
    "intermediate_size": 14336,
    "num_hidden_layers": 32,
    "num_attention_heads": 32,
    "num_key_value_heads": 8,
    "max_position_embeddings": 131072,
}


@pytest.mark.parametrize(("kind", "gib"), [("none", 14.96), ("int8", 8.66), ("nf4", 5.41)])
def test_resident_weights_of_eight_billion_parameters(kind, gib, tmp_path):
    """Embedding and head in bfloat16 and all: at most 5.5 GiB in NF4."""
    (tmp_path / "config.json").write_text(json.dumps(LLAMA_8B))
    mesh = make_mesh(devices=jax.devices()[:1])
    model = Base.open(tmp_path).abstract(
        mesh, dtype=jnp.bfloat16, quantization=dl.Quantization(kind)
    )
    total = sum(x.size * x.dtype.itemsize for x in jax.tree.leaves(nnx.state(model)))
    assert round(total / 2**30, 2) == gib


def test_decoding_leaves_the_stack_as_it_is(untied):
    assert better_apart(load(untied, "none"))
    assert not better_apart(load(untied))


# What is said.


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"kind": "nf3"}, "kind='nf3': must be one of none, int8, int4, nf4"),
        ({"pattern": {"up": "fp8"}}, "pattern.up='fp8': must be one of"),
        ({"tile": 0}, "tile=0: must be an even number"),
        ({"tile": 33}, "tile=33: must be an even number"),
    ],
)
def test_what_makes_no_sense(options, message):
    with pytest.raises(InputError, match=message):
        dl.Quantization(**options)


def test_what_does_not_fit_the_model(untied):
    with pytest.raises(InputError, match=r"pattern='q_porj' matches no module"):
        load(untied, q_porj="none")
    message = r"^tile=32: must divide the 48 inputs of layers.down_proj; .*=none"
    with pytest.raises(InputError, match=message):
        dl.load(untied.path, quantize=dl.Quantization("nf4", tile=32))
    message = "layers.o_proj.kernel, which is quantised: give layers.o_proj the kind none"
    with pytest.raises(InputError, match=message):
        dl.inject(load(untied), dl.DropLoRA(train_whole=("o_proj",)), key=dl.root_key(0))


def test_without_qwix_it_is_said_what_to_install(untied, monkeypatch):
    monkeypatch.setitem(sys.modules, "qwix", None)
    with pytest.raises(InputError, match=r"pip install 'droplora-jax\[quantized\]'"):
        load(untied)
    assert load(untied, "none")


# Runs.


def test_a_run_carries_on_in_the_same_bits_and_is_used_as_it_was_trained(base, tmp_path, droplora):
    yaml = write_run(base, tmp_path, model=QUANTIZED, train={"keep": 3})
    folder = tmp_path / "run"
    out = droplora.good("train", yaml)
    assert "base in nf4; " in out
    whole = adapter_bytes(folder)
    losses = [row["loss"] for row in metrics(folder) if "loss" in row]
    assert losses[-1] < losses[0]
    shutil.rmtree(folder / "adapter")
    for step in (8, 12):
        shutil.rmtree(folder / "checkpoints" / f"step_{step}")
    assert "carrying on from the checkpoint of step 4" in droplora.good("train", yaml)
    assert adapter_bytes(folder) == whole

    prompts = tmp_path / "prompts.jsonl"
    prompts.write_text('{"prompt": "odd? 7"}\n')
    output = tmp_path / "out.jsonl"
    droplora.good("generate", folder, "--prompts", prompts, "--output", output, *SHORT)
    assert set(kinds(open_model(str(folder)).model).values()) == {"nf4"}
    assert kinds(open_model(str(folder), quantize="none").model) == {}
    said = droplora.good("export", folder, "--to", tmp_path / "merged", "--format", "merged")

    # What the base's full precision changes is said: here by the two models themselves.
    tokens = jnp.asarray(np.random.default_rng(0).integers(0, VOCAB, (2, 32)), jnp.int32)
    ours, merged = (open_model(str(path)).model(tokens) for path in (folder, tmp_path / "merged"))
    assert f"with the adapter by {relative(merged, ours):.0e}"[:-4] in said
    assert relative(merged, ours) > 1e-2
    droplora.good("export", folder, "--to", tmp_path / "peft", "--format", "peft")
    recorded = json.loads((tmp_path / "peft" / "droplora_config.json").read_text())
    assert recorded["quantization"] == {"kind": "nf4", "tile": TILE, "pattern": {}}


def test_other_bits_are_other_settings(base, tmp_path, droplora):
    yaml = write_run(base, tmp_path, model=QUANTIZED, train={"steps": 4})
    droplora.good("train", yaml)
    result = droplora("train", yaml, "model.quantize=int8", "train.steps=8")
    assert result.code == 2
    assert "model.quantize: 'nf4' -> 'int8'" in result.err


def test_a_plan_counts_the_bits(base, tmp_path):
    """The compiler's arguments are what the plan says."""
    plans = {
        kind: plan(
            config_reader.read(
                write_run(base, tmp_path, model={"quantize": kind, "quantize_tile": TILE}),
                ["mesh.fsdp=1"],
            ),
            Base.open(base),
            topology("cpu:1"),
        )
        for kind in ("none", "int8", "nf4")
    }
    sizes = {kind: found.weights for kind, found in plans.items()}
    kernels = 2 * (2 * 32 * 32 + 2 * 32 * 16 + 3 * 32 * 48)
    scales = kernels // TILE * 4
    assert sizes["none"] - sizes["int8"] == 3 * kernels - scales
    assert sizes["none"] - sizes["nf4"] == kernels * 7 // 2 - scales
    assert len({found.flops_per_step for found in plans.values()}) == 1
