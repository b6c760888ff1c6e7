"""A step compiled from shapes: the run's own, once, and with the `remat` that fits."""

from __future__ import annotations

import dataclasses
import json
import signal
import threading
import time
from unittest import mock

import jax
import numpy as np
import pytest
from fake_step import FakeStep
from oracles import relative
from rich.console import Console
from run_fixtures import factors, metrics, process, write_run

from droplora_jax import cli
from droplora_jax.adapters.config import FROM_KERNEL
from droplora_jax.adapters.initializers import INITS
from droplora_jax.adapters.surgery import split
from droplora_jax.core.errors import InputError
from droplora_jax.core.sharding import make_mesh
from droplora_jax.runs import config_reader, memory, train_run
from droplora_jax.runs.compile import AUTO, AbstractStep, compile_step
from droplora_jax.runs.memory import GIB, Compiled
from droplora_jax.runs.open_base import open_base
from droplora_jax.runs.planning.hardware import topology
from droplora_jax.runs.planning.plan import plan
from droplora_jax.runs.preparation import prepare, prepared_step
from droplora_jax.training.step import init_state

STEPS = 10


ADAPTERS = {
    "token": {},
    "step": {"granularity": "step", "sampler": "exact"},
    "ranks": {"rank_pattern": {r"\.0\.q": 2}, "targets": "all-linear"},
    "dora": {"kind": "dora", "train_whole": ["final_norm"]},
    "ends": {"targets": ["paper", "embed", "lm_head"]},
    **{init: {"init": init, "targets": ["paper", "embed", "lm_head"]} for init in INITS},
    "pissa, ranks": {"init": "pissa", "rank_pattern": {r"\.0\.q": 2}},
    "dora, olora": {"kind": "dora", "init": "olora"},
    "learned, milora": {"kind": "learned", "init": "milora"},
}


@pytest.mark.parametrize("adapter", ADAPTERS.values(), ids=ADAPTERS.keys())
def test_the_shapes_are_those_of_the_loaded_model(base, tmp_path, adapter):
    """And the shardings: an executable takes no others."""
    mesh = {"data": 2, "fsdp": 2, "tensor": 2}
    config = config_reader.read(write_run(base, tmp_path, adapter=adapter, mesh=mesh))
    prepared = prepare(config, Console(quiet=True))
    abstract = prepared.step.arguments
    _, adapters, mask_keys, frozen = split(train_run.load_model(prepared))
    loaded = (init_state(adapters, prepared.step.optim.tx), mask_keys, frozen)
    shapes = (abstract.state, abstract.mask_keys, abstract.frozen)
    assert jax.tree.structure(loaded) == jax.tree.structure(shapes)
    for array, shape in zip(jax.tree.leaves(loaded), jax.tree.leaves(shapes), strict=True):
        assert (array.shape, array.dtype) == (shape.shape, shape.dtype)
        if array.committed:
            assert array.sharding.is_equivalent_to(shape.sharding, array.ndim)


@pytest.mark.parametrize(
    ("init", "quantize"), [("pissa", "none"), ("milora", "nf4"), ("olora", "none")]
)
def test_a_start_from_the_kernel_is_trained_resumed_and_planned(
    base, tmp_path, droplora, init, quantize
):
    """And the initial branch is still subtracted after resuming, in the same bits."""
    assert {"pissa", "milora", "olora"} == FROM_KERNEL
    sections = {
        "adapter": {"init": init},
        "model": {"quantize": quantize, "quantize_tile": 16},
        "train": {"steps": 3},
        "optim": {"warmup_steps": 1, "schedule": "constant"},
    }
    whole, parts = tmp_path / "whole", tmp_path / "parts"
    for folder in (whole, parts):
        folder.mkdir()
    droplora.good("train", write_run(base, whole, **sections), "train.steps=5")
    file = write_run(base, parts, **sections)
    droplora.good("train", file)
    out = droplora.good("train", file, "train.steps=5")
    assert "carrying on from the checkpoint of step 3\n" in out
    ours, theirs = (factors(folder / "run" / "adapter") for folder in (parts, whole))
    assert ours.keys() == theirs.keys()
    for name, value in ours.items():
        np.testing.assert_array_equal(value, theirs[name], err_msg=name)
    planned = json.loads(droplora.good("plan", file, "--topology", "cpu:8", "--json"))
    assert planned["devices"] == 8
    assert planned["optimizer"] == pytest.approx(2 * planned["adapters"], rel=0.01)


def test_the_step_is_compiled_once_and_nothing_after_the_second(base, tmp_path, monkeypatch):
    """Whatever the run's steps are, they are those of the executable that was made ahead."""
    lowered: list[str] = []
    original = jax.stages.Lowered.compile

    def compile(self, *arguments, **named):
        lowered.append(self.as_text().split("@", 1)[1].split(" ", 1)[0])
        return original(self, *arguments, **named)

    monkeypatch.setattr(jax.stages.Lowered, "compile", compile)
    traced: list[int] = []
    original_traced = AbstractStep.traced
    monkeypatch.setattr(
        AbstractStep,
        "traced",
        lambda *given: traced.append(1) or original_traced(*given),
    )
    monkeypatch.setattr(
        "droplora_jax.training.step.compile_train_step", None
    )  # no other way to one
    assert cli.main(["train", str(write_run(base, tmp_path, train={"steps": 3}))]) == 0
    assert len(traced) == 1
    assert lowered == ["jit_train_step"]


REMATS = ("everything", *AUTO)  # less and less is saved


def remat_run(base, folder, remat) -> dict[str, np.ndarray]:
    folder.mkdir()
    yaml = write_run(base, folder, train={"steps": 3, "remat": remat})
    assert cli.main(["train", str(yaml)]) == 0
    return factors(folder / "run" / "adapter")


def test_every_remat_trains_the_same_to_rounding(base, tmp_path):
    expected = remat_run(base, tmp_path / "everything", "everything")
    for remat in ("nothing", "auto"):
        found = remat_run(base, tmp_path / remat, remat)
        for name, value in expected.items():
            assert relative(found[name], value) < 2e-4, (remat, name)
    assert any(np.any(value) for name, value in expected.items() if "lora_B" in name)


@pytest.fixture(scope="module")
def planned(base, tmp_path_factory):
    """A run's configuration, and its plan by `remat`."""
    folder = tmp_path_factory.mktemp("planned")
    config = config_reader.read(
        write_run(base, folder, data={"max_length": 128}, train={"steps": STEPS})
    )
    opened, where = open_base(config.model), topology("cpu:8")
    return config, {name: plan(changed(config, name), opened, where) for name in REMATS}


def changed(config, remat):
    return dataclasses.replace(config, train=dataclasses.replace(config.train, remat=remat))


def test_what_a_remat_saves(planned):
    """Less is kept from the first to the last, and more is computed again."""
    _, plans = planned
    kept = [plans[name].temporaries for name in REMATS]
    flops = [plans[name].flops_per_step for name in REMATS]
    assert flops == sorted(flops)
    assert flops[0] < flops[-1]
    assert kept[0] > kept[1] > kept[2] >= kept[3]


@pytest.mark.parametrize("given", ["dots", "nothing"])
def test_auto_takes_the_first_that_fits(planned, given):
    config, plans = planned
    needed = {name: plans[name].hbm_bytes_per_chip for name in AUTO}
    step = prepared_step(config, open_base(config.model), make_mesh(config.mesh), STEPS)
    chosen = compile_step(step, changed(config, "auto"), "cpu", needed[given])
    assert chosen.remat == next(name for name in AUTO if needed[name] <= needed[given])
    reason = f"remat {chosen.remat}, the fastest that fits: {needed[chosen.remat] / GIB:.2f}"
    assert reason in chosen.reason
    assert needed["nothing"] < needed["dots"]


def test_when_nothing_fits(planned, monkeypatch):
    config, _ = planned
    monkeypatch.setattr(
        "droplora_jax.runs.compile.compiled", lambda *_: Compiled(object(), 3 * GIB)
    )
    with pytest.raises(InputError) as error:
        compile_step(mock.Mock(spec=AbstractStep), changed(config, "auto"), "cpu", 2 * GIB)
    assert "train.remat='auto': a step takes more memory than a device has" in str(error.value)
    for name in AUTO:
        assert f"{name} 3.00 GiB" in str(error.value)


@pytest.mark.parametrize("profiled", [True, False])
def test_a_program_to_be_traced_is_compiled_for_that(planned, monkeypatch, profiled):
    """On a GPU, whose compiler's options every platform's knows."""
    config, _ = planned
    given = mock.Mock(return_value=Compiled(FakeStep(), GIB))
    monkeypatch.setattr("droplora_jax.runs.compile.compiled", given)
    train = dataclasses.replace(config.train, profile_steps=(2, 3) if profiled else None)
    compile_step(
        mock.Mock(spec=AbstractStep), dataclasses.replace(config, train=train), "gpu", None
    )
    _, platform, options = given.call_args.args
    assert platform == "gpu"
    assert (options != {}) is profiled
    lowered = jax.jit(lambda x: x + 1).lower(1.0)
    assert memory.compiled(lowered, "cpu", options).executable(1.0) == 2
    with pytest.raises(jax.errors.JaxRuntimeError, match="No such compile option"):
        memory.compiled(lowered, "cpu", {"xla_gpu_not_one": "1"})


def test_auto_without_a_limit_says_so(base, tmp_path, droplora):
    yaml = write_run(base, tmp_path, train={"steps": 1, "remat": "auto"}, optim={"warmup_steps": 0})
    assert memory.limit(make_mesh()) is None
    out = droplora.good("train", yaml)
    assert "remat dots, the fastest: no limit of memory is known on cpu\n" in out
    assert "first step after " in out
    planned = json.loads(droplora.good("plan", yaml, "--topology", "cpu:8", "--json"))
    assert planned["settings"]["remat"] == "dots"


def test_there_is_nowhere_to_offload_to_on_a_cpu(base, tmp_path, droplora):
    yaml = write_run(base, tmp_path, train={"remat": "offload"})
    for command in (("train", yaml), ("plan", yaml, "--topology", "cpu:8")):
        result = droplora(*command)
        assert result.code == 2
        assert "train.remat='offload': a CPU has no memory beside the host's" in result.err
    assert not (tmp_path / "run").exists()


def test_moments_in_bfloat16_are_half_the_size_and_carry_on(base, tmp_path, droplora):
    """As optax has them: the first moment of Adam."""
    options = {"options": {"mu_dtype": "bfloat16"}, "schedule": "constant", "warmup_steps": 1}
    yaml = write_run(base, tmp_path, optim=options, train={"steps": 2, "eval_every": 9})
    sizes = [
        plan(c, open_base(c.model), topology("cpu:8"))
        for c in (config_reader.read(yaml), config_reader.read(yaml, ["optim.options={}"]))
    ]
    assert sizes[0].optimizer == pytest.approx(0.75 * sizes[1].optimizer, rel=0.01)
    droplora.good("train", yaml)
    droplora.good("train", yaml, "train.steps=3")
    assert [row["step"] for row in metrics(tmp_path / "run") if "loss" in row] == [1, 2, 3]


def test_an_error_of_the_compiler_is_told_after_the_weights(base, tmp_path, droplora, monkeypatch):
    def refuse(*_):
        raise InputError("it can't be compiled")

    monkeypatch.setattr(train_run, "compile_step", refuse)
    result = droplora("train", write_run(base, tmp_path))
    assert (result.code, result.err) == (2, "droplora: it can't be compiled\n")


def test_an_error_in_the_weights_waits_for_no_compiler(base, tmp_path, droplora, monkeypatch):
    never = threading.Event()
    monkeypatch.setattr(train_run, "compile_step", lambda *_: never.wait())

    def broken(*_, **__):
        raise InputError("the weights are broken")

    monkeypatch.setattr("droplora_jax.hf.base.Base.load", broken)
    result = droplora("train", write_run(base, tmp_path))
    never.set()
    assert (result.code, result.err) == (2, "droplora: the weights are broken\n")


def test_an_interrupt_waits_for_no_compiler(base, tmp_path):
    hanging = tmp_path / "hanging.py"
    hanging.write_text(
        "import time\n"
        "from droplora_jax import cli\n"
        "from droplora_jax.runs import train_run\n"
        "def hang(*_):\n"
        "    print('compiling', flush=True)\n"
        "    time.sleep(100)\n"
        "train_run.compile_step = hang\n"
        "cli.command()\n"
    )
    running = process("train", write_run(base, tmp_path), program=[str(hanging)])
    assert any("parameters trained" in line for line in running.stdout)
    begin = time.monotonic()
    running.send_signal(signal.SIGINT)
    _, err = running.communicate(timeout=60)
    assert time.monotonic() - begin < 20
    assert (running.returncode, err) == (130, "droplora: interrupted\n")
