"""Plans: the operations and messages of programs whose own are known, and of a run's step."""

from __future__ import annotations

import importlib.util
import json
import math
import os
import re
import subprocess
import sys
from functools import partial

import jax
import jax.numpy as jnp
import pytest
from jax.sharding import NamedSharding
from jax.sharding import PartitionSpec as P
from run_fixtures import write_run

from droplora_jax.core.config import MeshConfig
from droplora_jax.core.errors import InputError
from droplora_jax.core.sharding import described, make_mesh
from droplora_jax.runs import config_reader
from droplora_jax.runs.compile import step_options
from droplora_jax.runs.memory import _used
from droplora_jax.runs.open_base import open_base
from droplora_jax.runs.planning.flops import matrix_flops
from droplora_jax.runs.planning.hardware import KINDS, topology
from droplora_jax.runs.planning.hlo_collectives import collectives
from droplora_jax.runs.planning.plan import changes, plan
from droplora_jax.runs.preparation import prepared_step

MESH = make_mesh(MeshConfig(data=2, fsdp=2, tensor=2))


# Operations.


def test_products_are_counted_in_loops_and_when_they_are_made_again():
    w, x = jnp.ones((8, 8)), jnp.ones((4, 8))
    one = 2 * 4 * 8 * 8

    def loop(x, w):
        return jax.lax.scan(lambda x, _: (jnp.tanh(x @ w), None), x, length=5)[0].sum()

    def count(f, *arguments):
        return matrix_flops(jax.make_jaxpr(f)(*arguments))

    assert count(loop, x, w) == 5 * one
    assert count(jax.grad(loop), x, w) == 10 * one  # no gradient of the frozen w
    assert count(jax.grad(loop, argnums=(0, 1)), x, w) == 15 * one
    again = jax.grad(jax.checkpoint(loop))
    assert count(again, x, w) == 15 * one
    assert count(jax.jit(lambda x: jnp.einsum("ab,ab->a", x, x)), x) == 2 * 4 * 8
    over_data = jax.shard_map(
        lambda x, w: x @ w,
        mesh=MESH,
        in_specs=(P("data"), P()),
        out_specs=P("data"),
        axis_names={"data"},
    )
    assert count(over_data, x, w) == one  # each of two devices does a half


# Messages.


def compiled(f, *arguments):
    return jax.jit(f).lower(*arguments).compile().as_text()


def placed(shape, *axes):
    return jax.ShapeDtypeStruct(shape, jnp.float32, sharding=NamedSharding(MESH, P(*axes)))


def test_collectives_are_counted_by_kind_axis_and_loop():
    def gathered(w):
        replicated = NamedSharding(MESH, P(None, None))
        return jax.lax.with_sharding_constraint(w, replicated) * 2

    (found,) = collectives(compiled(gathered, placed((64, 32), "fsdp")), MESH)
    assert (found.kind, found.axes, found.count) == ("all-gather", "fsdp", 1)
    assert found.bytes == 64 * 32 * 4 // 2  # half of it comes from elsewhere

    def summed(x):
        def layer(x, _):
            return jax.lax.psum(x, "tensor") / 2, None

        return jax.lax.scan(layer, x, length=5)[0]

    looped = jax.shard_map(
        summed,
        mesh=MESH,
        in_specs=P("data", "tensor"),
        out_specs=P("data", "tensor"),
        check_vma=False,
    )
    (found,) = collectives(compiled(looped, placed((16, 32), "data", "tensor")), MESH)
    assert (found.kind, found.axes, found.count) == ("all-reduce", "tensor", 5)
    assert found.bytes == 5 * (8 * 16 * 4)  # half of it there and half of it back


# Topologies.


@pytest.mark.parametrize("name", ["v5e", "v9:2x2", "cpu", "cpu:0x2", "v5e:4x4x", "xv5e:4x4"])
def test_names_that_mean_nothing(name):
    with pytest.raises(InputError, match=rf"--topology {name}: must be a kind and its shape"):
        topology(name)


def test_more_cpu_devices_than_there_are():
    assert len(topology("cpu:4").devices) == 4
    with pytest.raises(InputError, match=r"cpu:64: 8 CPU device\(s\) here.*XLA_FLAGS"):
        topology("cpu:64")


def test_cpu_devices_are_made_where_nobody_asked_for_a_number():
    code = (
        "from droplora_jax.runs.planning.hardware import topology\n"
        "print([len(topology(f'cpu:{n}').devices) for n in (3, 2)])"
    )
    environment = {name: value for name, value in os.environ.items() if name != "XLA_FLAGS"}
    run = partial(subprocess.run, [sys.executable, "-c", code], capture_output=True, text=True)
    assert run(env=environment, check=True).stdout == "[3, 2]\n"
    two = environment | {"XLA_FLAGS": "--xla_force_host_platform_device_count=2"}
    assert "--topology cpu:3: 2 CPU device(s) here" in run(env=two, check=False).stderr


# A run's step.


@pytest.fixture
def file(base, tmp_path):
    return write_run(base, tmp_path, mesh={"data": 2, "fsdp": 2, "tensor": 2})


def test_a_plan_of_a_run(file, base):
    config = config_reader.read(file, ["train.global_batch=8", "train.micro_batch=4"])
    found = plan(config, open_base(config.model), topology("cpu:8"))
    hf = json.loads((base / "config.json").read_text())
    assert (found.fits, found.hbm_limit_bytes, found.tokens_per_second) == (None, None, None)
    assert described(found.settings["mesh"]) == "data=2 x fsdp=2 x tensor=2"
    assert found.tokens_per_step == 8 * config.data.max_length
    # Over fsdp x tensor = 4 devices; the small norms are on each.
    width, layers = hf["hidden_size"], hf["num_hidden_layers"]
    kv = width // hf["num_attention_heads"] * hf["num_key_value_heads"]
    per_layer = 2 * width * width + 2 * width * kv + 3 * width * hf["intermediate_size"]
    vocab = hf["vocab_size"] * width * (1 if hf["tie_word_embeddings"] else 2)
    split, norms = (layers * per_layer + vocab) * 4 / 4, (2 * layers + 1) * width * 4
    assert found.weights == pytest.approx(split + norms, rel=0.01)
    assert found.optimizer == pytest.approx(2 * found.adapters, rel=0.01)
    held = found.weights + found.adapters + found.optimizer
    assert found.hbm_bytes_per_chip >= held
    assert found.temporaries == found.hbm_bytes_per_chip - held
    # 4 operations a weight and token, and half as many again where the forward pass runs twice.
    useful = 4 * (layers * per_layer + hf["vocab_size"] * width) * found.tokens_per_step
    assert 1.0 < found.flops_per_step / useful < 2.5
    axes = {axis for one in found.collectives for axis in one.axes.split("+")}
    assert axes <= {"data", "fsdp", "tensor"}
    assert {"fsdp", "tensor"} <= axes


def traced(config, mesh, where):
    return prepared_step(config, open_base(config.model), mesh, 10).traced(step_options(config))


def gathered(config, where) -> list[str]:
    """The shapes of what a step gathers, as `8,32`."""
    mesh = make_mesh(config.mesh, where.devices)
    text = traced(config, mesh, where).lower().compile().as_text()
    lines = re.findall(r"= (.*?) all-gather(?:-start)?\(", text)
    return [shape for line in lines for shape in re.findall(r"\[([\d,]*)\]", line)]


@pytest.mark.parametrize(("length", "heads"), [(16, 0), (48, 1)], ids=["rows move", "head moves"])
def test_no_logits_are_gathered_and_the_head_only_for_many_rows(file, base, length, heads):
    """A device has its rows of the logits or its part of the vocabulary."""
    settings = ["mesh.data=1", "mesh.fsdp=8", "mesh.tensor=1", "train.global_batch=8"]
    config = config_reader.read(file, [*settings, f"data.max_length={length}"])
    hf = json.loads((base / "config.json").read_text())
    vocab, width = hf["vocab_size"], hf["hidden_size"]
    assert vocab % 8 == 0
    shapes = gathered(config, topology("cpu:8"))
    assert sum(shape == f"{width},{vocab}" for shape in shapes) == heads
    assert not [shape for shape in shapes if shape.count(",") > 1 and shape.endswith(f",{vocab}")]
    # The embedding's table, and the rows of the whole batch.
    assert f"{vocab},{width}" not in shapes
    if heads:
        assert not [shape for shape in shapes if shape.startswith("8,") and f",{width}" in shape]


def test_fewer_operations_where_more_is_kept(file):
    base = open_base(config_reader.read(file).model)
    of = {
        remat: plan(
            config_reader.read(file, [f"train.remat={remat}"]), base, topology("cpu:8")
        ).flops_per_step
        for remat in ("everything", "dots", "nothing")
    }
    assert of["everything"] <= of["dots"] < of["nothing"]


def test_the_command(file, droplora):
    out = droplora.good("plan", file, "--topology", "cpu:8")
    for text in (
        "8 devices as data=2 x fsdp=2 x tensor=2",
        "attention blockwise (auto: no other is made for cpu)",
        "MiB a device (weights",
        "all-gather",
    ):
        assert text in out
    found = json.loads(droplora.good("plan", file, "--topology", "cpu:8", "--json"))
    for key in ("fits", "hbm_bytes_per_chip", "hbm_limit_bytes", "collectives", "flops_per_step"):
        assert key in found
    assert found["compile_seconds"] > 0
    assert {"kind", "axes", "count", "bytes"} == found["collectives"][0].keys()
    for arguments, words in {
        ("--topology", "v5e"): "must be a kind and its shape",
        ("--topology", "cpu:8", "mesh.tensor=3"): "does not match the 8 device(s)",
        ("--topology", "cpu:8", "model.attention=splash"): (
            "model.attention='splash': it is made for tpu, and the devices are cpu; use auto, or"
        ),
        ("--topology", "cpu:8", "train.micro_batch=2"): "is not divisible by the 4 parts",
    }.items():
        result = droplora("plan", file, *arguments)
        assert result.code == 2
        assert words in result.err


def test_changes_go_from_cheap_to_dear(file):
    config = config_reader.read(file, ["train.global_batch=8", "train.remat=dots", "mesh.tensor=1"])
    tried = [" ".join(overrides) for overrides, _ in changes(config, topology("cpu:8"))]
    assert tried[:3] == ["train.micro_batch=4", "train.micro_batch=2", "train.micro_batch=1"]
    assert tried[3] == "train.remat=nothing"
    assert "mesh.data=1 mesh.fsdp=-1 mesh.tensor=2" in tried
    assert len(tried) == len(set(tried))


needs_libtpu = pytest.mark.skipif(
    importlib.util.find_spec("libtpu") is None, reason="the TPU compiler (libtpu) is not installed"
)


@needs_libtpu
def test_a_slice_of_tpus(file):
    """Compiled by the TPU compiler: what is held is split, and nothing as large is gathered."""
    config = config_reader.read(
        file, ["mesh.data=1", "mesh.fsdp=4", "mesh.tensor=1", "model.dtype=bfloat16"]
    )
    base = open_base(config.model)
    one = plan(
        config_reader.read(file, ["mesh.data=1", "mesh.fsdp=1", "mesh.tensor=1"]),
        base,
        topology("v5e:1x1"),
    )
    four = plan(config, base, topology("v5e:2x2"))
    assert one.fits
    assert four.fits
    assert four.hbm_limit_bytes == 16 * 2**30
    assert four.weights < 0.3 * one.weights
    assert {axes for c in four.collectives for axes in c.axes.split("+")} == {"fsdp"}
    assert not one.collectives
    assert 0 < four.mfu_at_most <= 1
    assert four.bound in four.seconds
    assert math.isfinite(four.tokens_per_second)


@needs_libtpu
@pytest.mark.parametrize("mesh", [{"fsdp": 4}, {"fsdp": 2, "context": 2}, {"fsdp": 2, "tensor": 2}])
def test_what_no_slice_may_gather(file, base, mesh):
    """Logits, the embedding's table, the rows of the whole batch, the weights of all layers."""
    axes = {"data": 1, "tensor": 1, "fsdp": 1} | mesh
    settings = [f"mesh.{name}={size}" for name, size in axes.items()]
    config = config_reader.read(file, [*settings, "data.max_length=48", "train.global_batch=8"])
    hf = json.loads((base / "config.json").read_text())
    vocab, width, layers = hf["vocab_size"], hf["hidden_size"], hf["num_hidden_layers"]
    shapes = gathered(config, topology("v5e:2x2"))
    assert shapes
    for shape in shapes:
        sizes = [int(size) for size in shape.split(",") if size]
        assert not (len(sizes) > 2 and sizes[-1] == vocab), shape
        assert shape != f"{vocab},{width}"
        assert not (sizes[0] == layers > 1 and math.prod(sizes) >= layers * width * width), shape
        assert not (sizes[0] == 8 and sizes[-1] == width and 48 in sizes), shape


@needs_libtpu
@pytest.mark.parametrize(
    ("settings", "words", "kernels"),
    [
        (["mesh.fsdp=2", "mesh.tensor=2"], "splash (auto: made for tpu)", {"fwd", "dkv"}),
        (["mesh.fsdp=2", "mesh.tensor=2", "model.attention=blockwise"], "blockwise (asked", set()),
        (["mesh.fsdp=2", "mesh.context=2"], "blockwise (auto: not splash, as it takes", set()),
    ],
)
def test_attention_on_a_slice(file, settings, words, kernels):
    config = config_reader.read(
        file, ["mesh.data=1", "mesh.tensor=1", "data.max_length=48", *settings]
    )
    where = topology("v5e:2x2")
    assert plan(config, open_base(config.model), where).settings["attention"].startswith(words)
    mesh = make_mesh(config.mesh, where.devices)
    text = traced(config, mesh, where).lower().as_text()
    assert set(re.findall(r'kernel_name = "splash_mha_(fwd|dkv|dq)', text)) == kernels


# The smallest slice of every kind, its devices, and the memory of one in GiB.
SMALLEST = {
    "v4:1x1x1": (1, 32),
    "v4:2x2x1": (4, 32),
    "v5e:1x1": (1, 16),
    "v5p:1x1x1": (1, 95),
    "v6e:1x1": (1, 32),
    "7x:1x1x1": (2, 96),
}


def test_every_kind_of_hardware_has_a_smallest_slice():
    assert {name.split(":")[0] for name in SMALLEST} == KINDS.keys()


@needs_libtpu
@pytest.mark.slow
@pytest.mark.parametrize("name", SMALLEST)
def test_the_smallest_slice_of_every_kind_is_planned(name, base, tmp_path, droplora):
    file = write_run(base, tmp_path, model={"dtype": "bfloat16"})
    found = json.loads(droplora.good("plan", file, "--topology", name, "--json"))
    devices, memory = SMALLEST[name]
    assert found["fits"] is True
    assert (found["devices"], found["hbm_limit_bytes"]) == (devices, memory * 2**30)
    assert found["bound"] in found["seconds"]
    assert 0 < found["mfu_at_most"] <= 1


@needs_libtpu
def test_too_much_for_a_chip(file):
    settings = ["mesh.data=1", "mesh.fsdp=1", "mesh.tensor=1", f"train.global_batch={2**23}"]
    config = config_reader.read(file, settings)
    found = plan(config, open_base(config.model), topology("v5e:1x1"))
    assert not found.fits
    assert found.hbm_bytes_per_chip > 15 * 2**30
    assert not found.collectives


@pytest.mark.parametrize(
    ("words", "number"),
    [
        ("Ran out of memory in memory space hbm. Used 20.12G of 15.75G hbm.", 20.12 * 2**30),
        ("temporaries is too big: required for HLO temporaries (512.5M) exceeds", 512.5 * 2**20),
        ("Something else went wrong in 15.75G hbm", None),
    ],
)
def test_the_compiler_says_how_much_is_too_much(words, number):
    assert _used(words) == (number if number is None else int(number))


@pytest.mark.skipif(importlib.util.find_spec("libtpu") is not None, reason="libtpu is installed")
def test_no_tpu_compiler_is_said(file, droplora):
    result = droplora("plan", file, "--topology", "v5e:4x4")
    assert result.code == 2
    assert "droplora: --topology v5e:4x4: the TPU compiler can't make it (" in result.err
    assert "needs libtpu (pip install 'jax[tpu]')" in result.err
