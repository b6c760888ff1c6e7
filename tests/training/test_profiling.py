"""Traces of a run's steps: files that Perfetto and TensorBoard read, and the parts in them."""

from __future__ import annotations

import gzip
import json
import os
import signal
from pathlib import Path

import jax
import pytest
from run_fixtures import adapter_bytes, metrics, write_run

from droplora_jax.training.profiling import PARTS, Profile, parts_of


def trace(folder: Path) -> list[dict]:
    """The events of the one trace of a run."""
    (file,) = (folder / "profile").glob("plugins/profile/*/perfetto_trace.json.gz")
    assert list(file.parent.glob("*.xplane.pb"))  # TensorBoard's
    content = json.loads(gzip.decompress(file.read_bytes()))
    assert "metadata" not in content
    return content["traceEvents"]


def test_a_trace_has_its_steps_and_their_parts_by_name(base, tmp_path, droplora):
    out = droplora.good(
        "train", write_run(base, tmp_path, train={"steps": 5, "profile_steps": [2, 3]})
    )
    events = trace(tmp_path / "run")
    steps = {e["args"]["step_num"] for e in events if "step_num" in e.get("args", {})}
    assert steps == {"2", "3"}
    named = {e["name"].partition(":")[0] for e in events if "hlo_op" in e.get("args", {})}
    for part in PARTS:
        assert part in named, part
    for part in ("attention", "feed_forward", "low_rank", "loss"):
        assert f"{part} (backward)" in named, part
    assert "\nprofile: " in out
    assert f"tensorboard --logdir {tmp_path / 'run' / 'profile'}\n" in out
    assert len([row for row in metrics(tmp_path / "run") if "loss" in row]) == 5


def test_a_profile_changes_no_bit(base, tmp_path, droplora):
    made = {}
    for name, steps in (("with", [1, 2]), ("without", None)):
        (tmp_path / name).mkdir()
        yaml = write_run(base, tmp_path / name, train={"steps": 4, "profile_steps": steps})
        droplora.good("train", yaml)
        made[name] = adapter_bytes(tmp_path / name / "run")["adapter_model.safetensors"]
    assert made["with"] == made["without"]
    assert not (tmp_path / "without" / "run" / "profile").exists()


def test_a_run_that_is_stopped_meanwhile_ends_well(base, tmp_path, droplora, monkeypatch):
    """What there was is written, and the run can carry on; it then has steps of its own to trace."""
    original = Profile.step

    def step(self, number, state):
        if number == 3:
            os.kill(os.getpid(), signal.SIGTERM)
        return original(self, number, state)

    yaml = write_run(base, tmp_path, train={"steps": 6, "profile_steps": [2, 5]})
    with monkeypatch.context() as patch:
        patch.setattr(Profile, "step", step)
        result = droplora("train", yaml)
    assert (result.code, result.err) == (143, "droplora: stopped by SIGTERM: step 3 is saved\n")
    assert {
        e["args"]["step_num"] for e in trace(tmp_path / "run") if "step_num" in e.get("args", {})
    } == {"2", "3"}
    droplora.good("train", yaml)
    assert len(list((tmp_path / "run" / "profile").glob("plugins/profile/*"))) == 2


@pytest.mark.parametrize("steps", ["[0, 2]", "[3, 2]", "[1]", "3"])
def test_steps_that_can_not_be(base, tmp_path, droplora, steps):
    result = droplora("train", write_run(base, tmp_path), f"train.profile_steps={steps}")
    assert result.code == 2
    assert "train.profile_steps" in result.err


def test_the_parts_of_a_program():
    """The innermost name counts; what has none has no part."""

    def f(x):
        with jax.named_scope("attention"):
            y = jax.numpy.sin(x)
            with jax.named_scope("low_rank"):
                y = jax.numpy.sort(y)
        return jax.numpy.cumsum(y)

    found = set(parts_of(jax.jit(f).lower(jax.numpy.ones(8)).compile().as_text()).values())
    assert {"attention", "low_rank"} <= found
    assert found <= {"attention", "low_rank"}
    back = jax.jit(jax.grad(lambda x: f(x).sum()))
    assert (
        "attention (backward)"
        in parts_of(back.lower(jax.numpy.ones(8)).compile().as_text()).values()
    )
