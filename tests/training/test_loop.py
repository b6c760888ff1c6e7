"""Whole runs through the command line: they learn, stop, carry on, and end in the same bits."""

from __future__ import annotations

import hashlib
import json
import math
import os
import re
import shutil
import signal
import subprocess
import time
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import jax
import numpy as np
import pytest
from data_fixtures import make_tokenizer, write_jsonl
from fake_step import FakeStep, use
from matplotlib.image import imread
from run_fixtures import (
    adapter_bytes,
    contents,
    factors,
    metrics,
    process,
    write_run,
)

from droplora_jax.core import prng
from droplora_jax.data.load import load
from droplora_jax.hf.tokenizer import load_tokenizer
from droplora_jax.runs import config_reader
from droplora_jax.training import evaluation
from droplora_jax.training.checkpoint import Checkpoints
from droplora_jax.training.loop import Run

STEPS = 40
LONG = {"train": {"steps": STEPS, "save_every": 5, "eval_every": 20}}
SUPPORT = Path(__file__).parents[1] / "support"


@pytest.fixture
def fake(monkeypatch) -> FakeStep:
    """Runs take a step that is not compiled."""
    return use(monkeypatch)


def trained(folder: Path) -> list[dict]:
    return [row for row in metrics(folder) if "loss" in row]


# --- a run ----------------------------------------------------------------------------------------


def test_a_run_learns_and_writes_what_is_documented(finished, base):
    folder = finished / "run"
    assert {path.name for path in folder.iterdir()} == {
        "config.yaml",
        "metrics.jsonl",
        "loss.png",
        "tensorboard",
        "checkpoints",
        "adapter",
    }
    assert {path.name for path in (folder / "adapter").iterdir()} == {
        "adapter_config.json",
        "adapter_model.safetensors",
        "droplora_config.json",
    }
    assert config_reader.read(folder / "config.yaml") == config_reader.read(finished / "run.yaml")
    assert imread(folder / "loss.png").std() > 0.01
    assert list((folder / "tensorboard").iterdir())
    evaluated = [row["eval_loss"] for row in metrics(folder) if "eval_loss" in row]
    assert len(evaluated) == 2
    losses = [row["loss"] for row in trained(folder)]
    assert evaluated[-1] < 0.5 * losses[0]
    assert np.mean(losses[-5:]) < 0.5 * np.mean(losses[:5])
    tensors = factors(folder / "adapter")
    assert len(tensors) == 2 * 5 * 2  # A and B of five modules in two layers
    assert all(np.any(tensor) for tensor in tensors.values())


def test_the_rows_of_metrics(finished):
    rows = trained(finished / "run")
    assert [row["step"] for row in rows] == list(range(1, STEPS + 1))
    documented = {"step", "loss", "learning_rate", "grad_norm", "tokens"}
    assert set(rows[0]) == documented  # compiling: no speed yet
    assert all(set(row) == documented | {"tokens_per_second"} for row in rows[1:])
    for row in rows:
        n = row["step"] - 1
        rate = 0.02 * min(n / 2, (STEPS - n) / (STEPS - 2))
        np.testing.assert_allclose(row["learning_rate"], rate, rtol=1e-5, atol=1e-9)
        assert 16 * 40 < row["tokens"] <= 16 * 72
        assert row["grad_norm"] > 0
    assert [row["step"] for row in metrics(finished / "run") if "eval_loss" in row] == [20, 40]


def test_what_a_person_sees(base, tmp_path, droplora, fake):
    yaml = write_run(base, tmp_path, train={"steps": 4})
    out = droplora.good("train", yaml)
    folder = tmp_path / "run"
    for text in (
        "rows from",
        "tokens are trained",
        "[[the answer is",
        "parameters trained",
        "attention blockwise (auto: no other is made for cpu)",
        "8 x cpu",
        "step 4/4  loss",
        "evaluation loss",
        f"done: the adapter is in {folder / 'adapter'}",
        f"droplora export {folder} --to {folder}-merged --format merged",
    ):
        assert text in out


def test_every_step_of_a_run_draws_other_masks(base, tmp_path, droplora):
    """Equal rows and a rate of next to nothing: only masks can make two steps differ."""
    row = {"instruction": "odd? 7", "output": "the answer is true"}
    yaml = write_run(
        base,
        tmp_path,
        data={"train": write_jsonl(tmp_path / "one.jsonl", [row] * 16), "valid": None},
        optim={"learning_rate": 1e-30, "weight_decay": 0.0},
        train={"steps": 4},
    )
    droplora.good("train", yaml)
    assert len({round(line["grad_norm"], 5) for line in trained(tmp_path / "run")}) == 4


def test_all_steps_of_a_run_have_the_mask_root_of_its_seed(base, tmp_path, droplora, fake):
    droplora.good("train", write_run(base, tmp_path, seed=11, train={"steps": 3}))
    expected = jax.random.key_data(prng.run_keys(11).mask)
    assert len(fake.mask_roots) == 3
    for root in fake.mask_roots:
        np.testing.assert_array_equal(jax.random.key_data(root), expected)


# --- stopping and carrying on ---------------------------------------------------------------------


def wait_for(condition: Callable[[], bool], running: subprocess.Popen) -> None:
    deadline = time.monotonic() + 240
    while not condition():
        assert running.poll() is None, running.communicate()
        assert time.monotonic() < deadline
        time.sleep(0.005)


@pytest.mark.parametrize(
    ("number", "code"),
    [(signal.SIGKILL, -signal.SIGKILL), (signal.SIGTERM, 143)],
    ids=["kill -9", "SIGTERM"],
)
def test_a_run_that_was_stopped_ends_in_the_same_bits(
    finished, base, tmp_path, droplora, number, code
):
    yaml = write_run(base, tmp_path, **LONG)
    folder = tmp_path / "run"
    stopped = process("train", yaml)
    wait_for((folder / "checkpoints" / "step_10").exists, stopped)
    stopped.send_signal(number)
    _, err = stopped.communicate(timeout=120)
    assert stopped.returncode == code
    steps = sorted(
        int(path.name[5:]) for path in (folder / "checkpoints").iterdir() if path.name[5:].isdigit()
    )
    assert 10 <= steps[-1] < STEPS
    if number != signal.SIGKILL:
        assert err == f"droplora: stopped by {number.name}: step {steps[-1]} is saved\n"
        assert metrics(folder)[-1]["step"] == steps[-1]
        assert (folder / "loss.png").exists()
    assert not (folder / "adapter").exists()
    out = droplora.good("train", yaml)
    assert f"carrying on from the checkpoint of step {steps[-1]}\n" in out
    assert adapter_bytes(folder) == adapter_bytes(finished / "run")
    rows, expected = metrics(folder), metrics(finished / "run")
    for row in [*rows, *expected]:
        row.pop("tokens_per_second", None)
    assert rows == expected


@pytest.mark.slow
@pytest.mark.parametrize("seed", range(3))
def test_a_run_killed_again_and_again_ends_in_the_same_bits(
    finished, base, tmp_path, droplora, seed
):
    """Killed at any moment: while it starts, in a step, in a save, between two."""
    yaml = write_run(base, tmp_path, **LONG)
    random = np.random.default_rng(seed)
    for _ in range(8):
        running = process("train", yaml)
        time.sleep(random.uniform(2, 14))
        running.kill()
        running.communicate()
    droplora.good("train", yaml)
    assert adapter_bytes(tmp_path / "run") == adapter_bytes(finished / "run")


def send(monkeypatch, numbers: list[signal.Signals], *, at: int) -> None:
    """Signals to this process when the batch of a step is asked for."""
    original = Run.feed

    def feed(self, start):
        batches = original(self, start)
        following = type(batches).__next__

        def next_batch(iterator):
            if iterator is batches and iterator.get_state() == {"next_index": at}:
                for number in numbers:
                    os.kill(os.getpid(), number)
            return following(iterator)

        monkeypatch.setattr(type(batches), "__next__", next_batch)
        return batches

    monkeypatch.setattr(Run, "feed", feed)


@pytest.mark.parametrize(("number", "code"), [(signal.SIGTERM, 143), (signal.SIGINT, 130)])
def test_a_signal_lets_the_step_end_and_saves_it(base, tmp_path, droplora, fake, number, code):
    """And the same command ends in the bits of a run that was never stopped."""
    yaml = write_run(base, tmp_path)
    before = signal.getsignal(signal.SIGTERM), signal.getsignal(signal.SIGINT)
    with pytest.MonkeyPatch.context() as patch:
        send(patch, [number], at=2)
        result = droplora("train", yaml)
    assert result.code == code
    assert result.err == f"droplora: stopped by {number.name}: step 3 is saved\n"
    assert (tmp_path / "run" / "checkpoints" / "step_3").is_dir()
    assert (signal.getsignal(signal.SIGTERM), signal.getsignal(signal.SIGINT)) == before
    assert "carrying on from the checkpoint of step 3\n" in droplora.good("train", yaml)
    (tmp_path / "whole").mkdir()
    droplora.good("train", write_run(base, tmp_path / "whole"))
    runs = [tmp_path / "run", tmp_path / "whole" / "run"]
    stopped, whole = (adapter_bytes(run)["adapter_model.safetensors"] for run in runs)
    assert stopped == whole


def test_a_run_that_can_not_stop_in_time_is_ended(base, tmp_path):
    """Its step hangs, say; what takes machines away does not wait either."""
    hanging = tmp_path / "hanging.py"
    hanging.write_text(
        "import sys, time\n"
        f"sys.path.insert(0, {str(SUPPORT)!r})\n"
        "import pytest\n"
        "from fake_step import use\n"
        "from droplora_jax import cli\n"
        "from droplora_jax.training import monitor\n"
        "use(pytest.MonkeyPatch())\n"
        "after = monitor.Monitor.after\n"
        "def hang(self, step, metrics):\n"
        "    if step == 3:\n"
        "        print('hanging', flush=True)\n"
        "        time.sleep(100)\n"
        "    after(self, step, metrics)\n"
        "monitor.Monitor.after = hang\n"
        "sys.exit(cli.main(sys.argv[1:]))\n"
    )
    yaml = write_run(base, tmp_path, train={"save_every": 1, "stop_seconds": 2})
    running = process("train", yaml, program=[str(hanging)])
    assert any("hanging" in line for line in running.stdout)
    begin = time.monotonic()
    running.terminate()
    _, err = running.communicate(timeout=60)
    assert time.monotonic() - begin < 20
    assert running.returncode == 143
    assert "SIGTERM came 2 seconds ago (train.stop_seconds) and the state could not be saved" in err
    assert "the newest good one is step 2" in err


def test_a_signal_in_the_last_step_is_too_late(base, tmp_path, droplora, fake, monkeypatch):
    send(monkeypatch, [signal.SIGINT], at=3)
    droplora.good("train", write_run(base, tmp_path, train={"steps": 4}))
    assert (tmp_path / "run" / "adapter").is_dir()


def test_a_second_interrupt_acts_at_once(base, tmp_path, droplora, fake, monkeypatch):
    send(monkeypatch, [signal.SIGINT, signal.SIGINT], at=2)
    result = droplora("train", write_run(base, tmp_path))
    assert (result.code, result.err) == (130, "droplora: interrupted\n")
    assert not (tmp_path / "run" / "checkpoints" / "step_3").exists()
    assert not (tmp_path / "run" / "adapter").exists()


def test_a_finished_run_says_so(copy, droplora):
    before = contents(copy)
    out = droplora.good("train", copy / "run.yaml")
    assert f"finished already: the adapter is in {copy / 'run' / 'adapter'}" in out
    assert contents(copy) == before


@pytest.mark.parametrize(
    ("overrides", "changed"),
    [
        (["seed=9"], ["seed: 7 -> 9"]),
        (["optim.learning_rate=1", "adapter.rank=8"], ["learning_rate: 0.02 -> 1.0", "rank: 4"]),
        (["data.max_length=60", "train.steps=44"], ["data.max_length: 72 -> 60"]),
        (["train.global_batch=8"], ["train.global_batch: 16 -> 8"]),
        (["adapter.targets=[q_proj$]"], ["adapter.targets: 'paper' -> ['q_proj$']"]),
    ],
)
def test_other_settings_are_an_error_that_lists_them(copy, droplora, overrides, changed):
    before = contents(copy)
    result = droplora("train", copy / "run.yaml", *overrides)
    assert result.code == 2
    assert str(copy / "run") in result.err
    for change in changed:
        assert change in result.err
    assert "train.steps" not in result.err
    assert contents(copy) == before


def test_a_data_file_that_has_changed_is_named_with_what_it_was(copy, droplora):
    """A run does not go on with other rows than those that it began with."""
    train, valid = copy / "data" / "train.jsonl", copy / "data" / "valid.jsonl"
    was = hashlib.sha256(train.read_bytes()).hexdigest()[:12]
    train.write_bytes(train.read_bytes() + b"\n")
    now = hashlib.sha256(train.read_bytes()).hexdigest()[:12]
    before = contents(copy)
    result = droplora("train", copy / "run.yaml", "train.steps=44")
    assert result.code == 2
    assert f"{train} was {was} and is {now}" in result.err
    assert str(valid) not in result.err
    assert contents(copy) == before


def test_a_file_more_or_less_is_named(copy, droplora):
    """A folder or a glob is the same setting with other files in it."""
    for file in (copy / "run.yaml", copy / "run" / "config.yaml"):
        file.write_text(file.read_text().replace("/train.jsonl", "/train*.jsonl"))
    more = copy / "data" / "train2.jsonl"
    shutil.copy(copy / "data" / "train.jsonl", more)
    result = droplora("train", copy / "run.yaml", "train.steps=44")
    assert result.code == 2
    assert f"{more} was not there" in result.err


def test_another_tokenizer_under_a_run_is_an_error(copy, base, droplora, tmp_path):
    other = shutil.copytree(base, tmp_path / "other")
    make_tokenizer(adds_bos=False).save_pretrained(other)
    for file in (copy / "run.yaml", copy / "run" / "config.yaml"):
        file.write_text(file.read_text().replace(str(base), str(other)))
    result = droplora("train", copy / "run.yaml", "train.steps=44")
    assert result.code == 2
    assert "holds a run on the same files, of which" in result.err
    assert "the tokenizer has changed" in result.err


def test_a_checkpoint_says_where_in_which_data_the_run_is(finished, base):
    data = Checkpoints(finished / "run" / "checkpoints", read_only=True).record(STEPS)["data"]
    assert data["next_batch"] == STEPS
    config = config_reader.read(finished / "run" / "config.yaml").data
    tokenizer = load_tokenizer(base)
    loaded = [load(places, tokenizer, config)[0] for places in (config.train, config.valid)]
    assert data["rows"] == sum(len(rows) for rows in loaded)
    assert data["tokens"] == sum(int(rows.lengths.sum()) for rows in loaded)
    for file in data["files"]:
        path = Path(file["path"])
        assert file["sha256"] == hashlib.sha256(path.read_bytes()).hexdigest()


def test_a_mixture_with_rows_held_out(base, tmp_path, droplora, fake, monkeypatch):
    evaluated = []
    monkeypatch.setattr(evaluation, "_mean_loss", lambda *given: evaluated.append(given[1]) or 0.5)
    data = {
        "train": [
            {"path": str(tmp_path / "data" / "train.jsonl"), "weight": 0.7},
            {"path": str(tmp_path / "data" / "valid.jsonl"), "weight": 0.3, "template": "none"},
        ],
        "valid": None,
        "valid_fraction": 0.2,
        "packing": "best_fit",
    }
    out = droplora.good("train", write_run(base, tmp_path, data=data, train={"steps": 4}))
    kept = sum(int(n) for n in re.findall(r"(\d+) rows to train on", out))
    assert f"{round(0.2 * kept)} rows are held out for validation" in out
    assert "full (best_fit)" in out
    assert metrics(tmp_path / "run")[-1]["eval_loss"] == 0.5
    assert evaluated
    assert all(batches.packed for batches in evaluated)


def test_noise_of_a_run_is_drawn_anew_in_every_step_and_exact_on_resume(base, tmp_path, droplora):
    """NEFTune: of a run that was made longer the rest is that of one that was as long at once."""
    folders = {}
    for name, alpha, first in [("whole", 30.0, 4), ("parts", 30.0, 2), ("without", 0.0, 4)]:
        made = {"steps": first, "neftune_alpha": alpha, "eval_every": 4, "save_every": 2}
        optim = {"schedule": "constant", "warmup_steps": 0}
        adapter = {"targets": ["paper", "embed", "lm_head"]}
        (tmp_path / name).mkdir()
        file = write_run(base, tmp_path / name, train=made, optim=optim, adapter=adapter)
        droplora.good("train", file)
        droplora.good("train", file, "train.steps=4")
        folders[name] = tmp_path / name / "run"
    whole, parts, without = ([row["loss"] for row in trained(f)] for f in folders.values())
    assert whole == parts
    assert (
        adapter_bytes(folders["whole"])["adapter_model.safetensors"]
        == (adapter_bytes(folders["parts"])["adapter_model.safetensors"])
    )
    # The branches do nothing in the first step, so whatever differs there is the noise.
    assert abs(whole[0] - without[0]) > 1e-3


def test_longer_on_another_mesh_and_with_other_cadences(copy, droplora):
    old = adapter_bytes(copy / "run")
    out = droplora.good(
        "train",
        copy / "run.yaml",
        "train.steps=44",
        "mesh.data=2",
        "mesh.fsdp=2",
        "mesh.tensor=2",
        "train.micro_batch=null",
        "train.eval_every=2",
        "train.save_every=3",
        "train.log_every=2",
        "train.keep=1",
        "train.remat=dots",
    )
    folder = copy / "run"
    assert f"carrying on from the checkpoint of step {STEPS}\n" in out
    new = adapter_bytes(folder)
    assert new["adapter_model.safetensors"] != old["adapter_model.safetensors"]
    assert new["adapter_config.json"] == old["adapter_config.json"]
    assert [row["step"] for row in trained(folder)] == [*range(1, STEPS + 1), 42, 44]
    assert config_reader.read(folder / "config.yaml").train.steps == 44
    assert not [path for path in folder.iterdir() if path.name.startswith(".")]


def test_a_finished_run_whose_adapter_is_gone_writes_it_again(copy, droplora, fake):
    old = adapter_bytes(copy / "run")
    shutil.rmtree(copy / "run" / "adapter")
    droplora.good("train", copy / "run.yaml")
    assert adapter_bytes(copy / "run") == old


def test_a_run_that_was_moved_carries_on(copy, droplora):
    """The name of the folder is no setting."""
    (copy / "run").rename(copy / "elsewhere")
    out = droplora.good("train", copy / "run.yaml", f"output={copy / 'elsewhere'}")
    assert "finished already" in out


def test_a_folder_without_a_checkpoint_starts_over_with_any_settings(copy, droplora, fake):
    shutil.rmtree(copy / "run" / "checkpoints")
    shutil.rmtree(copy / "run" / "adapter")
    out = droplora.good("train", copy / "run.yaml", "seed=9", "train.steps=4")
    assert "carrying on" not in out
    assert [row["step"] for row in trained(copy / "run")] == [1, 2, 3, 4]
    assert config_reader.read(copy / "run" / "config.yaml").seed == 9


# --- what goes wrong on the way -------------------------------------------------------------------

EXPLODING = FakeStep(loss=lambda step: math.nan if step == 2 else 5.0)


@pytest.mark.parametrize(
    ("save_every", "kept", "said"),
    [(1, ["step_1"], "the last good checkpoint, step 1, is kept"), (10, [], "no checkpoint yet")],
)
def test_a_loss_that_is_no_number(base, tmp_path, droplora, monkeypatch, save_every, kept, said):
    use(monkeypatch, EXPLODING)
    yaml = write_run(base, tmp_path, data={"valid": None}, train={"save_every": save_every})
    result = droplora("train", yaml)
    assert result.code == 3
    assert result.err.startswith("droplora: step 2: loss nan")
    assert said in result.err
    folder = tmp_path / "run"
    assert [path.name for path in (folder / "checkpoints").iterdir()] == kept
    assert not (folder / "adapter").exists()
    assert [row["step"] for row in metrics(folder)] == [1]


def test_an_evaluation_that_is_not_finite_ends_the_run_and_is_never_the_best(
    base, tmp_path, droplora, monkeypatch
):
    losses = iter([0.5, 1.0, math.nan])
    use(monkeypatch, eval_loss=lambda: next(losses))
    result = droplora("train", write_run(base, tmp_path, train={"keep": 1}))
    assert result.code == 3
    assert result.err.startswith("droplora: step 12: eval_loss nan: stopped; the last good ")
    assert "the last good checkpoint, step 8, is kept" in result.err
    folder = tmp_path / "run"
    checkpoints = Checkpoints(folder / "checkpoints", read_only=True)
    assert (checkpoints.steps, checkpoints.best, checkpoints.best_score) == ([4, 8], 4, -0.5)
    assert [row["eval_loss"] for row in metrics(folder) if "eval_loss" in row] == [0.5, 1.0]
    assert not (folder / "adapter").exists()


@pytest.mark.parametrize("evaluated", [True, False])
def test_a_state_that_is_not_finite_is_never_saved(
    base, tmp_path, droplora, monkeypatch, evaluated
):
    """The loss of step 8 is still finite: it was computed before the state was updated."""

    def spoil(step, state):
        if step < 8:
            return state
        return replace(
            state, opt_state=jax.tree.map(lambda x: x * math.nan if x.ndim else x, state.opt_state)
        )

    use(monkeypatch, FakeStep(spoil=spoil))
    data = {} if evaluated else {"valid": None}
    result = droplora("train", write_run(base, tmp_path, data=data))
    assert result.code == 3
    assert re.search(
        r"step 8: opt_state\..* is not finite \(\d+ arrays in all\): stopped; the last good "
        r"checkpoint, step 4, is kept",
        result.err,
    )
    assert Checkpoints(tmp_path / "run" / "checkpoints", read_only=True).steps == [4]
    assert not (tmp_path / "run" / "adapter").exists()


def test_a_lower_rate_after_a_loss_that_is_no_number(base, tmp_path, droplora, monkeypatch):
    """The advice that the error gives can be followed where no checkpoint was written."""
    use(monkeypatch, EXPLODING)
    yaml = write_run(base, tmp_path, data={"valid": None})
    assert droplora("train", yaml).code == 3
    use(monkeypatch)
    droplora.good("train", yaml, "optim.learning_rate=0.01", "train.steps=4")


def test_a_full_disk(base, tmp_path, droplora, fake):
    """The run says so, and the same command carries on when there is room."""
    folder = tmp_path / "run"
    folder.mkdir()
    mount = ["mount", "-t", "tmpfs", "-o", "size=4m", "tmpfs", str(folder)]
    if os.geteuid() != 0 or subprocess.run(mount, capture_output=True).returncode:
        pytest.skip("mounting a small file system needs root")
    try:
        yaml = write_run(base, tmp_path, **LONG)
        droplora.good("train", yaml, "train.steps=5", "optim.schedule=constant")
        (folder / "filler").write_bytes(b"x" * (shutil.disk_usage(folder).free - 20_000))
        longer = ["train", yaml, "optim.schedule=constant", "train.steps=10"]
        result = droplora(*longer)
        assert result.code == 2
        assert "could not be written" in result.err
        assert "the newest good one is step 5" in result.err
        (folder / "filler").unlink()
        assert "carrying on from the checkpoint of step 5\n" in droplora.good(*longer)
        assert [row["step"] for row in trained(folder)] == list(range(1, 11))
    finally:
        subprocess.run(["umount", "-l", str(folder)], check=True)


def test_metrics_are_strict_json(finished):
    def refuse(constant: str):
        raise AssertionError(constant)

    for line in (finished / "run" / "metrics.jsonl").read_text().splitlines():
        json.loads(line, parse_constant=refuse)
