"""Real processes on one machine, joined by JAX, against one process with the same devices."""

from __future__ import annotations

import re
import signal
import time
from pathlib import Path

import jax
import numpy as np
import pytest
from data_fixtures import write_jsonl
from oracles import relative
from run_fixtures import (
    adapter_bytes,
    factors,
    metrics,
    processes,
    rows,
    write_run,
)

from droplora_jax.core.config import DistributedConfig
from droplora_jax.core.distributed import join
from droplora_jax.core.errors import InputError

TRAIN = {"global_batch": 8, "save_every": 4, "eval_every": 4, "log_every": 1}
SETTINGS = {
    "train": {**TRAIN, "keep": 1},
    "mesh": {"data": 4, "fsdp": 2, "tensor": 1},
    "optim": {"schedule": "constant"},  # so that it does not matter when the end is known
}
ENDLESS = "train.steps=100000"


def written(base, folder, **train):
    """A run with everything by which its data could depend on the number of processes."""
    folder.mkdir(exist_ok=True)
    data = folder / "data"
    mixture = [
        {"path": str(data / "train.jsonl"), "weight": 3},
        {"path": str(data / "valid.jsonl"), "weight": 1},
    ]
    packed = {"packing": "best_fit", "train": mixture, "valid": None, "valid_fraction": 0.2}
    settings = {**SETTINGS, "train": {**SETTINGS["train"], **train}}
    return write_run(base, folder, data=packed, **settings)


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


def losses(run) -> list[float]:
    return [row.get("loss", row.get("eval_loss")) for row in metrics(run)]


def scores(run) -> list[float]:
    return [row["accuracy/boolq"] for row in metrics(run) if "loss" not in row]


def checkpoints(run) -> dict[int, Path]:
    """Those that are complete, by step."""
    folders = (run / "checkpoints").glob("step_*")
    return {int(folder.name[5:]): folder for folder in folders if folder.name[5:].isdigit()}


def assert_same_run(run, other):
    assert [row["step"] for row in metrics(run)] == [row["step"] for row in metrics(other)]
    np.testing.assert_allclose(losses(run), losses(other), rtol=1e-5)
    ours, theirs = factors(run / "adapter"), factors(other / "adapter")
    assert ours.keys() == theirs.keys()
    for name, value in ours.items():
        assert relative(value, theirs[name]) < 1e-5, name


def until(condition, seconds: float = 240) -> None:
    deadline = time.monotonic() + seconds
    while not condition():
        assert time.monotonic() < deadline
        time.sleep(0.05)


def assert_all_stopped(running, number: int) -> tuple[int, str]:
    """All saved the same step because of a signal to one. The step, and what the first says."""
    codes, (out, *_), errors = ended(running)
    assert codes == [128 + number] * len(running), errors
    step = int(errors[0].split("step ")[1].split()[0])
    for i, error in enumerate(errors):
        line = f"process {i} of {len(running)}: stopped by {signal.Signals(number).name}: "
        assert f"droplora: {line}step {step} is saved\n" in error
    return step, out


def test_a_run_goes_from_four_processes_to_one_to_two_and_ends_as_in_one(base, droplora, tmp_path):
    """No place in the data, no mask, no weight and no score depends on their number or the mesh.

    Every process hears of a signal to one of them; one process speaks and writes.
    """
    questions = [
        {"instruction": row["instruction"], "answer": row["output"].split()[-1]}
        for row in rows(24, seed=2)
    ]
    tasks = {"boolq": write_jsonl(tmp_path / "boolq.jsonl", questions)}
    train = {"eval_tasks": tasks, "eval_examples": 10, "best": "boolq"}
    yaml = written(base, tmp_path / "several", **train)
    run, alone = tmp_path / "several" / "run", tmp_path / "alone" / "run"

    running = processes(4, "train", yaml, ENDLESS, devices=8)
    until(lambda: checkpoints(run))
    running[1].send_signal(signal.SIGTERM)
    stopped, out = assert_all_stopped(running, signal.SIGTERM)
    assert "as data=4 x fsdp=2 in 4 processes; attention blockwise" in out
    assert stopped in checkpoints(run)

    resumed = 4 * (stopped // 4 + 1)
    out = droplora.good("train", yaml, f"train.steps={resumed}", "mesh.data=1", "mesh.fsdp=8")
    assert f"carrying on from the checkpoint of step {stopped}" in out

    steps = resumed + 4
    out = good(processes(2, "train", yaml, f"train.steps={steps}", devices=8))
    assert f"carrying on from the checkpoint of step {resumed}" in out
    assert "as data=4 x fsdp=2 in 2 processes; attention blockwise" in out
    assert f"; {steps} steps\n" in out

    droplora.good("train", written(base, tmp_path / "alone", **train), f"train.steps={steps}")
    assert_same_run(run, alone)
    assert scores(run) == scores(alone)
    assert len(scores(run)) == steps // 4
    assert checkpoints(run).keys() == checkpoints(alone).keys()  # all had to save the best


@pytest.mark.parametrize("dead", [0, 1])
def test_when_one_process_dies_the_others_stop_and_say_why(base, tmp_path, dead):
    yaml = written(base, tmp_path)
    running = processes(2, "train", yaml, ENDLESS, "distributed.timeout=10", devices=8)
    until(lambda: checkpoints(tmp_path / "run"))
    killed = time.monotonic()
    running[dead].kill()
    codes, _, errors = ended(running)
    assert time.monotonic() - killed < 40
    assert codes[dead] == -signal.SIGKILL
    assert codes[1 - dead] == -signal.SIGABRT  # by JAX, from a thread: the main one hangs
    assert "This most likely indicates that another task died" in errors[1 - dead]


def test_a_mistake_is_told_by_every_process_and_ends_all(base, tmp_path):
    yaml = written(base, tmp_path)
    running = processes(2, "train", yaml, ENDLESS, "mesh.tensor=3", devices=2)
    codes, _, errors = ended(running)
    assert codes == [2, 2]
    for i, error in enumerate(errors):
        assert f"droplora: process {i} of 2: mesh " in error
        assert "does not match the 2 device(s)" in error
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
    long = {"steps": 1000, "save_every": 10, "eval_every": 500, "log_every": 100, "keep": 2}
    undisturbed, disturbed = tmp_path / "undisturbed", tmp_path / "disturbed"
    good(processes(2, "train", written(base, undisturbed, **long)))
    yaml = written(base, disturbed, **long)
    random = np.random.default_rng(seed)
    steps = []
    for _ in range(20):
        running = processes(2, "train", yaml, "distributed.timeout=10")
        time.sleep(random.uniform(3, 22))
        running[random.integers(2)].kill()
        codes, _, errors = ended(running)
        assert set(codes) <= {0, -signal.SIGKILL, -signal.SIGABRT}, errors
        steps.append(max(checkpoints(disturbed / "run"), default=0))
    assert steps == sorted(steps)
    assert len(set(steps)) > 5, steps
    print("newest checkpoint after every kill:", steps)
    good(processes(2, "train", yaml))
    assert adapter_bytes(disturbed / "run") == adapter_bytes(undisturbed / "run")
