"""The benchmark suite compares like with like, and counts what it says it counts.

Slow, and marked so: no part of the package depends on the suite, and torch.compile takes a minute.
"""

from __future__ import annotations

import json
import os
import subprocess
import sys
from dataclasses import replace
from pathlib import Path
from typing import Any

import jax.numpy as jnp
import numpy as np
import pytest
import torch
from run_fixtures import rows as make_rows

pytestmark = pytest.mark.slow
FOLDER = Path(__file__).parents[2] / "examples" / "benchmarks"


@pytest.fixture(autouse=True)
def benchmarks(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.syspath_prepend(str(FOLDER))


def random_rows(count: int, seed: int = 0) -> tuple[Any, ...]:
    from work import Row

    random = np.random.default_rng(seed)
    made = []
    for length in random.integers(3, 20, count):
        trained = random.random(length) < 0.5
        trained[0] = False
        made.append(Row(random.integers(0, 100, length).astype(np.int32), trained))
    return tuple(made)


# --- the same weights everywhere -----------------------------------------------------------------


def test_weights_are_the_same_bits_in_every_framework():
    from weights import numpy_values, scaled, seed, value_bits

    name, shape = "model.layers.3.mlp.up_proj.weight", (129, 64)
    ours = numpy_values(name, shape)
    index = jnp.arange(ours.size, dtype=jnp.uint32).reshape(shape)
    in_jax = scaled(value_bits(index, jnp.uint32(seed(name))).astype(jnp.float32))
    index = torch.arange(ours.size, dtype=torch.int32).view(shape)
    in_torch = scaled(value_bits(index, name).float())
    assert np.array_equal(ours, in_jax)
    assert np.array_equal(ours, in_torch)
    assert np.array_equal(ours, np.asarray(jnp.asarray(ours, jnp.bfloat16), np.float32))


def test_weights_look_like_independent_noise():
    from weights import numpy_values

    one, other = (numpy_values(f"layers.{i}", (256, 256)) for i in (0, 1))
    size = one.size**-0.5
    assert abs(one.mean()) < 4 * size * one.std()
    assert one.std() == pytest.approx(0.018, rel=0.01)
    for a, b in ((one, other), (one, one.T), (one[1:], one[:-1]), (one[:, 1:], one[:, :-1])):
        assert abs(np.corrcoef(a.ravel(), b.ravel())[0, 1]) < 5 * size
    assert np.linalg.svd(one, compute_uv=False)[0] < 2.1 * 0.0181 * 16  # of noise: 2 sqrt(n) std


# --- the same work -------------------------------------------------------------------------------


def packed(rows: tuple[Any, ...]) -> list[dict[str, Any]]:
    from droplora_jax.data import rows as examples
    from droplora_jax.data.batches import Batches

    own = [examples.Row(row.ids, row.trained) for row in rows]
    settings = {"batch_size": 2, "seed": 0, "shuffle": False, "max_length": 32}
    batches = Batches(own, **settings, packing="best_fit")
    return [batches.take(indices) for indices in batches.all_indices()]


def padded_tally(rows: tuple[Any, ...], batch: int) -> Any:
    from sides.peft import _tally
    from work import Tally, pad

    batches = (pad(rows[i : i + batch]) for i in range(0, len(rows), batch))
    return sum(map(_tally, batches), Tally())


def test_padded_and_packed_rows_are_the_same_work():
    from sides import ours
    from work import Tally

    rows = random_rows(12)
    one = sum(map(ours._tally, packed(rows)), Tally())
    assert one == padded_tally(rows, 4) == padded_tally(rows[::-1], 5)
    assert one.targets == sum(int(row.trained.sum()) for row in rows)
    assert one.tokens == sum(len(row.ids) - 1 for row in rows)


@pytest.mark.parametrize("what", ["token", "target", "row"])
def test_other_work_is_noticed(what: str):
    rows = random_rows(12)
    row = rows[5]
    ids, trained = row.ids.copy(), row.trained.copy()
    if what == "token":
        ids[1] += 1
    if what == "target":
        trained[-1] = ~trained[-1]
    others = [] if what == "row" else [replace(row, ids=ids, trained=trained)]
    changed = (*rows[:5], *others, *rows[6:])
    assert padded_tally(changed, 4) != padded_tally(rows, 4)


def record(side: Any, *, loss: float = 9.0, norm: float = 0.4, tokens: int = 7) -> Any:
    from turns import Record
    from work import Done, Tally
    from workers import Ready, Result

    done = Done(loss, norm, 1, Tally(tokens, tokens, 0))
    first = Result(wall=1.0, cpu=1.0, value=done, resident=0, device=None)
    return Record(side, Ready(1.0, {}, 0), loss, first, done)


@pytest.mark.parametrize(
    ("change", "words"),
    [
        ({"loss": 9.01}, "first loss is 9.000000 and 9.010000"),
        ({"norm": 0.401}, "gradient norm"),
        ({"tokens": 8}, "tokens and targets"),
    ],
)
def test_sides_that_do_other_work_are_refused(change: dict[str, Any], words: str):
    from sides.ours import Ours
    from sides.peft import Peft
    from turns import UnlikeWork, check_alike

    work = type("Work", (), {"dtype": "float32"})
    plain = Ours(drop_rate=0.0)
    check_alike({"peft": record(Peft()), "lora": record(plain), "drop": record(Ours())}, work)
    with pytest.raises(UnlikeWork, match=words):
        check_alike({"peft": record(Peft()), "lora": record(plain, **change)}, work)


def test_masks_change_the_gradient_and_nothing_else():
    from sides.ours import Ours
    from sides.peft import Peft
    from turns import UnlikeWork, check_alike

    work = type("Work", (), {"dtype": "float32"})
    check_alike({"peft": record(Peft()), "drop": record(Ours(), norm=0.5)}, work)
    with pytest.raises(UnlikeWork, match="first loss"):
        check_alike({"drop": record(Ours(), loss=8.0), "peft": record(Peft())}, work)


# --- what is counted -----------------------------------------------------------------------------


def test_useful_operations_are_those_that_frozen_weights_need():
    from torch.utils.flop_counter import FlopCounterMode
    from transformers import LlamaConfig, LlamaForCausalLM
    from work import SHAPES

    shape, rows, length = SHAPES["tiny"], 2, 16
    model = LlamaForCausalLM(LlamaConfig(**shape.hf, attn_implementation="eager"))
    model.requires_grad_(False)
    x = torch.randn(rows, length, shape.hidden_size, requires_grad=True)
    with FlopCounterMode(display=False) as counter:
        model(inputs_embeds=x).logits.sum().backward()
    # It counts what lies beyond the diagonal too, half of the attention.
    beyond = rows * 6 * length**2 * shape.hidden_size * shape.num_hidden_layers
    assert shape.useful_flops(rows, length) == counter.get_total_flops() - beyond


def test_a_ratio_is_taken_round_by_round():
    from results import Pair, _ratio
    from sides.peft import Peft

    fast, slow = record(Peft()), record(Peft())
    fast.seconds, slow.seconds = [[1.0], [2.0], [4.0]], [[2.0], [5.0], [8.0]]
    speed = _ratio(Pair("fast", "slow", "speed", 2.0), fast, slow, work=None)
    assert (speed.ratio, speed.low, speed.high, speed.met) == (2.0, 2.0, 2.5, True)
    time = _ratio(Pair("fast", "slow", "time", 0.4), fast, slow, work=None)
    assert (time.ratio, time.low, time.high, time.met) == (0.5, 0.4, 0.5, False)


# --- all of it -----------------------------------------------------------------------------------


def suite(*arguments: object) -> subprocess.CompletedProcess[str]:
    command = [sys.executable, str(FOLDER / "suite.py"), *map(str, arguments)]
    environment = {**os.environ, "PYTHONPATH": str(FOLDER.parents[1]), "XLA_FLAGS": ""}
    return subprocess.run(command, env=environment, capture_output=True, text=True)


@pytest.mark.slow
def test_real_rows_from_the_file_to_the_figures(tmp_path: Path):
    data = tmp_path / "rows.json"
    data.write_text(json.dumps(make_rows(60)))
    small = ["--shape", "tiny", "--rank", "4", "--rows", "24", "--batch", "6", "--rounds", "1"]
    sides = ["--sides", "PEFT eager", "DropLoRA", "--output", str(tmp_path / "out")]
    ran = suite("real", "--data", data, *small, *sides)
    assert ran.returncode == 0, ran.stdout + ran.stderr
    found = json.loads((tmp_path / "out" / "real.json").read_text())
    ours, theirs = found["sides"]["DropLoRA token"], found["sides"]["PEFT eager"]
    assert ours["given"] == theirs["given"]
    assert theirs["steps"] == 4
    assert ours["first_loss"] == pytest.approx(theirs["first_loss"], rel=1e-4)
    speed = next(own for own in found["ratios"] if own["what"] == "speed")
    assert speed["ratio"] == pytest.approx(theirs["turn_seconds"] / ours["turn_seconds"])
    assert f"| {speed['ratio']:.2f} (" in ran.stdout
    assert (tmp_path / "out" / "real.png").read_bytes().startswith(b"\x89PNG")


def test_a_side_that_is_not_installed_says_so():
    from sides.tunix import Tunix
    from work import SHAPES, Work
    from workers import Failed, Place, Worker, chosen_cores

    folder = Path("nowhere")
    work = Work(SHAPES["tiny"], random_rows(2), 2, 2, "float32", "cpu", folder)
    isolated = Place(chosen_cores(0), environment={"PYTHONPATH": "", "PYTHONNOUSERSITE": "1"})
    with pytest.raises(Failed, match="not installed .*tunix") as caught:
        Worker(Tunix(), work, isolated)
    assert caught.value.kind == "unavailable"


def test_a_side_that_is_late_is_left_out():
    from sides.peak import Peak
    from workers import Failed, Place, Worker, chosen_cores

    with pytest.raises(Failed) as caught:
        Worker(Peak("jax", 8), None, Place(chosen_cores(0)), deadline=0.0)
    assert caught.value.kind == "time"


def test_rows_of_documents_are_other_work_than_rows_of_one(tmp_path: Path):
    from sides.ours import Ours
    from work import SHAPES, Work, dense_rows, write_config, write_factors

    shape = SHAPES["tiny"]
    write_config(tmp_path, shape)
    write_factors(tmp_path, shape, [4])
    rows = dense_rows(shape, 2, 64)
    work = Work(shape, rows, 2, 2, dtype="float32", device="cpu", folder=tmp_path)
    alone = Ours(rank=4, attention="blockwise").prepare(work)
    several = Ours(rank=4, attention="blockwise", document=8).prepare(work)
    segments = {}
    for name, side in {"alone": alone, "several": several}.items():
        with side._batches(rows) as batches:
            segments[name] = np.asarray(next(batches)["segment_ids"])[0]
    assert (segments["alone"] == 1).all()
    assert set(np.diff(segments["several"]).flat) == {0, 1}
    assert 4 < segments["several"].max() < 16
    assert abs(alone.plain_loss() - several.plain_loss()) > 1e-4


def test_a_kernel_that_can_not_be_had_is_skipped(tmp_path: Path):
    ran = suite("gpu-packed", "--shape", "tiny", "--batch", "2", "--output", str(tmp_path))
    assert ran.returncode == 0, ran.stdout + ran.stderr
    for kernel in ("cudnn", "tokamax"):
        assert f"{kernel}: skipped: attention='{kernel}': it is made for cuda" in ran.stdout
