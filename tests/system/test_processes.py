"""Real processes on one machine, joined by JAX, against one process with the same devices."""

from __future__ import annotations

import re
import signal
import time

import jax
import numpy as np
import pytest
from data_fixtures import write_jsonl
from oracles import relative
from run_fixtures import (
    adapter_bytes,
    factors,
    make_base,
    metrics,
    process,
    processes,
    rows,
    write_run,
)

from droplora_jax.core.config import DistributedConfig
from droplora_jax.core.distributed import join
from droplora_jax.core.errors import InputError

SETTINGS = {
    "train": {"steps": 8, "global_batch": 8, "save_every": 4, "eval_every": 4} | {"log_every": 1},
    "mesh": {"data": 2, "fsdp": 2, "tensor": 1},
    "optim": {"schedule": "constant"},  # so that it does not matter when the end is known
}


def written(base, folder, settings=SETTINGS):
    """A run with everything by which its data could depend on the number of processes."""
    data = folder / "data"
    mixture = [
        {"path": str(data / "train.jsonl"), "weight": 3},
        {"path": str(data / "valid.jsonl"), "weight": 1},
    ]
    packed = {"packing": "best_fit", "train": mixture, "valid": None, "valid_fraction": 0.2}
    return write_run(base, folder, data=packed, **settings)


@pytest.fixture(scope="module")
def base(tmp_path_factory):
    return make_base(tmp_path_factory.mktemp("base")).path


def ended(running):
    """Codes, and what the processes said."""
    said = [one.communicate(timeout=1200) for one in running]
    return [one.returncode for one in running], [out for out, _ in said], [err for _, err in said]


# What the library that moves data between CPUs says: with a number after each but the third, a
# digit here. Its threads write piece by piece, so that messages stand within each other.
GLOO = (
    "[Gloo] Rank ",
    " is connected to ",
    " peer ranks. ",
    "Expected number of connected peer ranks is : ",
)


def says_nothing(out: str) -> bool:
    """But whole messages of Gloo's."""
    counts = {out.count(piece) for piece in GLOO}
    rest = re.sub("|".join(map(re.escape, GLOO)), "", out)
    rest, digits = re.subn(r"\d", "", rest)
    return len(counts) == 1 and digits == 3 * min(counts) and not rest.strip()


def good(running) -> str:
    """What the first of some processes says, none of which has anything to complain of."""
    codes, (first, *others), errors = ended(running)
    assert not any(codes), errors
    for out in others:
        assert says_nothing(out), out
    return first


@pytest.fixture(scope="module")
def alone(base, tmp_path_factory):
    """The folder of a run of one process with four devices."""
    folder = tmp_path_factory.mktemp("alone")
    good([process("train", written(base, folder), devices=4)])
    return folder / "run"


def losses(run) -> list[float]:
    return [row.get("loss", row.get("eval_loss")) for row in metrics(run)]


def assert_same_run(run, other):
    assert [row["step"] for row in metrics(run)] == [row["step"] for row in metrics(other)]
    np.testing.assert_allclose(losses(run), losses(other), rtol=1e-5)
    ours, theirs = factors(run / "adapter"), factors(other / "adapter")
    assert ours.keys() == theirs.keys()
    for name, value in ours.items():
        assert relative(value, theirs[name]) < 1e-5, name


@pytest.mark.parametrize("count", [2, 4])
def test_several_processes_train_as_one(base, alone, tmp_path, count):
    """Masks and data are the same, or the losses were not; one process speaks and writes."""
    out = good(processes(count, "train", written(base, tmp_path)))
    assert f"as data=2 x fsdp=2 in {count} processes; attention blockwise" in out
    assert "; 8 steps\n" in out
    assert_same_run(tmp_path / "run", alone)


@pytest.mark.parametrize(("before", "after"), [(4, 1), (1, 2)])
def test_a_run_goes_on_in_another_number_of_processes(base, alone, tmp_path, before, after):
    """On another mesh too: no place in the data, no mask and no weight depends on either."""

    def start(count, *overrides):
        yaml = written(base, tmp_path)
        if count == 1:
            return [process("train", yaml, *overrides, devices=4)]
        return processes(count, "train", yaml, *overrides)

    good(start(before, "train.steps=4"))
    out = good(start(after, "mesh.data=1", "mesh.fsdp=4"))
    assert "carrying on from the checkpoint of step 4" in out
    assert_same_run(tmp_path / "run", alone)


def test_a_task_is_scored_by_several_processes_as_by_one(base, tmp_path):
    """And its best checkpoint is the same, which all of them have to save."""
    asked = [
        {"instruction": row["instruction"], "answer": row["output"].split()[-1]}
        for row in rows(24, seed=2)
    ]
    tasks = {"boolq": write_jsonl(tmp_path / "boolq.jsonl", asked)}
    train = {**SETTINGS["train"], "steps": 16, "save_every": 100, "keep": 1, "best": "boolq"}
    settings = {**SETTINGS, "train": {**train, "eval_tasks": tasks, "eval_examples": 10}}
    for name in ("one", "two"):
        (tmp_path / name).mkdir()
    good([process("train", written(base, tmp_path / "one", settings), devices=4)])
    good(processes(2, "train", written(base, tmp_path / "two", settings)))
    one, two = (metrics(tmp_path / name / "run") for name in ("one", "two"))
    scores = [row["accuracy/boolq"] for row in one if "loss" not in row]
    assert scores == [row["accuracy/boolq"] for row in two if "loss" not in row]
    assert len(scores) == 4
    kept = [
        {path.name for path in (tmp_path / name / "run" / "checkpoints").iterdir()}
        for name in ("one", "two")
    ]
    assert kept[0] == kept[1]


def until(condition, seconds: float = 120) -> None:
    deadline = time.monotonic() + seconds
    while not condition():
        assert time.monotonic() < deadline
        time.sleep(0.05)


@pytest.mark.parametrize("dead", [0, 1])
def test_when_one_process_dies_the_others_stop_and_say_why(base, alone, tmp_path, dead):
    yaml = written(base, tmp_path)
    running = processes(2, "train", yaml, "train.steps=100000", "distributed.timeout=10")
    until(lambda: (tmp_path / "run" / "checkpoints" / "step_4").is_dir())
    killed = time.monotonic()
    running[dead].kill()
    codes, _, errors = ended(running)
    assert time.monotonic() - killed < 40
    assert codes[dead] == -signal.SIGKILL
    assert codes[1 - dead] == -signal.SIGABRT  # by JAX, from a thread: the main one hangs
    assert "This most likely indicates that another task died" in errors[1 - dead]


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGINT])
def test_a_signal_to_one_process_stops_and_saves_all(base, tmp_path, number):
    yaml = written(base, tmp_path)
    running = processes(2, "train", yaml, "train.steps=100000")
    until(lambda: (tmp_path / "run" / "checkpoints" / "step_4").is_dir())
    running[1].send_signal(number)
    codes, _, errors = ended(running)
    assert codes == [128 + number] * 2
    step = int(errors[0].split("step ")[1].split()[0])
    for i, error in enumerate(errors):
        said = f"process {i} of 2: stopped by {number.name}: step {step} is saved"
        assert f"droplora: {said}\n" in error
    assert (tmp_path / "run" / "checkpoints" / f"step_{step}").is_dir()


def test_a_mistake_is_told_by_every_process_and_ends_all(base, tmp_path):
    yaml = written(base, tmp_path)
    codes, _, errors = ended(processes(2, "train", yaml, "mesh.tensor=3"))
    assert codes == [2, 2]
    for i, error in enumerate(errors):
        assert f"droplora: process {i} of 2: mesh " in error
        assert "does not match the 4 device(s)" in error
        assert "Traceback" not in error


def test_half_a_cluster_is_no_process_alone(monkeypatch):
    """Or every process would train by itself, into one folder."""

    def initialize(*arguments, **options):
        raise ValueError("Number of processes must be defined.")

    monkeypatch.setattr(jax.distributed, "initialize", initialize)
    with pytest.raises(InputError, match="found a cluster but not all of it .Number of processes"):
        join(DistributedConfig())


@pytest.mark.parametrize(
    ("options", "words"),
    [
        ({"coordinator": "host:1"}, "^num_processes is missing"),
        ({"process_id": 1}, "^coordinator is missing"),
        ({"coordinator": "host", "num_processes": 2, "process_id": 0}, "must be host:port"),
        ({"coordinator": "h:1", "num_processes": 2, "process_id": 2}, "must be from 0 to 1"),
        ({"timeout": 1}, "must be at least 10"),
    ],
)
def test_how_processes_find_each_other_is_checked(options, words):
    with pytest.raises(InputError, match=words):
        DistributedConfig(**options)


@pytest.mark.slow
@pytest.mark.parametrize("seed", range(1))
def test_a_run_whose_processes_are_killed_twenty_times_ends_in_the_same_bits(base, tmp_path, seed):
    """A random one of two, at a random moment: while they start, in a step, in a save, at the end."""
    long = {
        **SETTINGS,
        "train": {**SETTINGS["train"], "steps": 1000, "save_every": 10, "eval_every": 500}
        | {"log_every": 100},
    }
    folders = undisturbed, disturbed = tmp_path / "undisturbed", tmp_path / "disturbed"
    for folder in folders:
        folder.mkdir()
    good(processes(2, "train", written(base, undisturbed, long)))
    yaml = written(base, disturbed, long)
    random = np.random.default_rng(seed)
    steps = []
    for _ in range(20):
        running = processes(2, "train", yaml, "distributed.timeout=10")
        time.sleep(random.uniform(3, 22))
        running[random.integers(2)].kill()
        codes, _, errors = ended(running)
        assert set(codes) <= {0, -signal.SIGKILL, -signal.SIGABRT}, errors
        checkpoints = disturbed / "run" / "checkpoints"
        done = [int(p.name[5:]) for p in checkpoints.glob("step_*") if p.name[5:].isdigit()]
        steps.append(max(done, default=0))
    assert steps == sorted(steps)
    assert len(set(steps)) > 5, steps
    print("newest checkpoint after every kill:", steps)
    good(processes(2, "train", yaml))
    assert adapter_bytes(disturbed / "run") == adapter_bytes(undisturbed / "run")
