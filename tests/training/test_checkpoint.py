"""Checkpoints: which are kept, bit for bit, on any mesh, and what a kill or a full disk leaves."""

from __future__ import annotations

import logging
import os
import re
import shutil
import subprocess
from dataclasses import replace
from unittest import mock

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

import droplora_jax as dl
from droplora_jax.core.config import MeshConfig
from droplora_jax.core.errors import InputError
from droplora_jax.core.finite import not_finite
from droplora_jax.core.sharding import make_mesh
from droplora_jax.training import checkpoint
from droplora_jax.training.checkpoint import Checkpoints, flatten
from droplora_jax.training.checksums import digests
from droplora_jax.training.step import TrainState, init_state

CONFIG = {"seed": 3, "optim": {"learning_rate": 3e-4, "clip_norm": None}, "files": ["a", "b"]}


def state_on(folder, mesh: MeshConfig, *, seed: int | None = None, step: int = 0) -> TrainState:
    """A state on a mesh: as new, or every leaf at random."""
    model = dl.load(folder.path, mesh=make_mesh(mesh), dtype=jnp.float32)
    model = dl.inject(model, dl.DropLoRA(rank=4), key=dl.root_key(0))
    state = init_state(dl.split(model)[1], optax.chain(optax.clip(1.0), optax.adamw(1e-3)))
    if seed is None:
        return state
    random = np.random.default_rng(seed)

    def fill(leaf):
        value = random.normal(size=leaf.shape).astype(leaf.dtype) if leaf.ndim else leaf + step
        return jax.device_put(value, leaf.sharding)

    return replace(jax.tree.map(fill, state), step=jnp.int32(step))


@pytest.fixture(scope="module")
def state(untied):
    return state_on(untied, MeshConfig(), seed=1)


@pytest.fixture
def checkpoints(tmp_path):
    opened = Checkpoints(tmp_path / "checkpoints", keep=2)
    yield opened
    opened.close()


def save(checkpoints, state, step, score=None):
    checkpoints.save(replace(state, step=jnp.int32(step)), CONFIG, score)
    checkpoints.wait()


def assert_same(one: TrainState, other: TrainState) -> None:
    assert jax.tree.structure(one) == jax.tree.structure(other)
    for a, b in zip(jax.tree.leaves(one), jax.tree.leaves(other), strict=True):
        assert a.dtype == b.dtype
        np.testing.assert_array_equal(np.asarray(a), np.asarray(b))


def test_a_new_folder_holds_none(checkpoints):
    assert (checkpoints.steps, checkpoints.latest) == ([], None)
    assert (checkpoints.best, checkpoints.best_score) == (None, None)


def test_the_newest_and_the_best_are_kept(checkpoints, state):
    for step, score in [(1, -3.0), (2, -1.0), (3, -2.0), (4, None), (5, -4.0)]:
        save(checkpoints, state, step, score)
    assert checkpoints.steps == [2, 4, 5]
    assert (checkpoints.latest, checkpoints.best, checkpoints.best_score) == (5, 2, -1.0)
    save(checkpoints, state, 6, -0.5)
    assert checkpoints.steps == [5, 6]
    assert checkpoints.best == 6


@pytest.mark.parametrize("score", [np.nan, np.inf, -np.inf])
def test_a_score_that_is_not_finite_is_never_the_best(checkpoints, state, score):
    save(checkpoints, state, 1, score)
    assert (checkpoints.best, checkpoints.best_score) == (None, None)
    with pytest.raises(InputError, match="step best: no checkpoint was evaluated"):
        checkpoints.choose("best")
    for step, other in [(2, -2.0), (3, score), (4, -3.0), (5, score)]:
        save(checkpoints, state, step, other)
    again = Checkpoints(checkpoints.folder, read_only=True)
    for opened in (checkpoints, again):
        assert opened.steps == [2, 4, 5]
        assert (opened.best, opened.best_score, opened.choose("best")) == (2, -2.0, 2)


@pytest.mark.parametrize("part", ["adapters", "opt_state"])
def test_a_state_on_disk_that_is_not_finite_is_set_aside(checkpoints, state, part):
    save(checkpoints, state, 1)
    save(checkpoints, with_nan(state, part), 2)
    with pytest.raises(checkpoint.Corrupt, match=rf"step_2: {part}\..* that is not finite"):
        checkpoints.restore(2, state)
    said = []
    restored = checkpoints.restore_newest(state, said.append)
    assert int(restored.step) == 1
    assert "corrupt_2, and skipped" in said[0]
    assert checkpoints.steps == [1]


@pytest.mark.parametrize("part", ["adapters", "opt_state"])
@pytest.mark.parametrize("value", [np.nan, np.inf])
def test_a_state_that_is_not_finite_is_named(state, part, value):
    assert not_finite(flatten(state)) == []
    (name,) = not_finite(flatten(with_nan(state, part, value)))
    assert name.startswith(f"{part}.")


def with_nan(state: TrainState, part: str, value: float = np.nan) -> TrainState:
    """The state with one value in the largest array of `part` replaced."""
    leaves, structure = jax.tree.flatten(getattr(state, part))
    place = max(range(len(leaves)), key=lambda i: leaves[i].size)
    leaves[place] = leaves[place].at[(-1,) * leaves[place].ndim].set(value)
    return replace(state, **{part: jax.tree.unflatten(structure, leaves)})


def test_without_evaluations_only_the_newest_are_kept(checkpoints, state):
    for step in (1, 2, 3):
        save(checkpoints, state, step)
    assert checkpoints.steps == [2, 3]
    assert checkpoints.best is None


def test_another_process_sees_the_same(checkpoints, state):
    for step, score in [(1, 0.3), (2, 0.2), (3, 0.1)]:
        save(checkpoints, state, step, score)
    again = Checkpoints(checkpoints.folder, keep=2)
    assert (again.steps, again.best, again.best_score) == ([1, 2, 3], 1, 0.3)
    record = again.record(3)
    assert record.pop("digests").keys() == flatten(state).keys()
    assert record == {"data": {"next_batch": 3}, **CONFIG}
    again.close()


@pytest.mark.parametrize(
    ("saved", "restored"),
    [
        (MeshConfig(fsdp=8), MeshConfig(fsdp=8)),
        (MeshConfig(fsdp=8), MeshConfig(data=2, fsdp=2, tensor=2)),
        (MeshConfig(data=2, fsdp=2, tensor=2), MeshConfig(data=8, fsdp=1)),
    ],
    ids=["the same", "1x8x1 to 2x2x2", "2x2x2 to 8x1x1"],
)
def test_a_state_comes_back_bit_for_bit_on_any_mesh(untied, checkpoints, saved, restored):
    written = state_on(untied, saved, seed=5, step=17)
    checkpoints.save(written, CONFIG)
    checkpoints.wait()
    like = state_on(untied, restored)
    read = checkpoints.restore(17, like)
    assert_same(read, written)
    assert int(read.step) == 17
    for leaf, expected in zip(jax.tree.leaves(read), jax.tree.leaves(like), strict=True):
        assert leaf.sharding.is_equivalent_to(expected.sharding, leaf.ndim)


def test_a_state_of_another_shape_is_an_error(untied, checkpoints, state):
    save(checkpoints, state, 1)
    model = dl.load(untied.path, dtype=jnp.float32)
    model = dl.inject(model, dl.DropLoRA(rank=8), key=dl.root_key(0))
    like = init_state(dl.split(model)[1], optax.chain(optax.clip(1.0), optax.adamw(1e-3)))
    with pytest.raises(Exception, match="shape"):
        checkpoints.restore(1, like)


def test_saving_does_not_wait_but_the_state_may_be_donated(untied, checkpoints):
    """What is written is the state at `save`, whatever becomes of its buffers."""
    written = state_on(untied, MeshConfig(), seed=5, step=1)
    copy = jax.tree.map(np.asarray, written)
    checkpoints.save(written, CONFIG)
    for leaf in jax.tree.leaves(written):
        leaf.delete()
    checkpoints.wait()
    assert_same(
        jax.tree.map(np.asarray, checkpoints.restore(1, state_on(untied, MeshConfig()))), copy
    )


# --- what a kill leaves ---------------------------------------------------------------------------


def test_a_checkpoint_that_was_cut_short_is_not_there(checkpoints, state):
    """Orbax writes under another name and renames when all is on disk."""
    save(checkpoints, state, 4, 2.0)
    cut = checkpoints.folder / "step_8.orbax-checkpoint-tmp"
    (checkpoints.folder / "step_4").rename(cut)
    again = Checkpoints(checkpoints.folder)
    assert (again.steps, again.latest, again.best) == ([], None, None)
    with pytest.raises(InputError, match="no complete checkpoint"):
        again.choose("last")
    save(again, state, 8)
    assert again.steps == [8]
    assert_same(again.restore(8, state), replace(state, step=jnp.int32(8)))
    again.close()


def test_an_older_one_is_found_beside_one_that_was_cut_short(checkpoints, state):
    save(checkpoints, state, 4, 2.0)
    (checkpoints.folder / "step_8.orbax-checkpoint-tmp" / "state").mkdir(parents=True)
    again = Checkpoints(checkpoints.folder)
    assert (again.steps, again.choose("last"), again.choose("best")) == ([4], 4, 4)
    again.close()


# --- choosing -------------------------------------------------------------------------------------


def test_choose(checkpoints, state):
    for step, score in [(10, 0.3), (20, 0.2), (30, 0.1)]:
        save(checkpoints, state, step, score)
    assert [checkpoints.choose(which) for which in ("last", "best", "20")] == [30, 10, 20]


@pytest.mark.parametrize("which", ["15", "0", "-10", "first", "1e1", "", "²"])
def test_choosing_what_is_not_there(checkpoints, state, which):
    save(checkpoints, state, 10, 1.0)
    with pytest.raises(InputError, match=r"checkpoints: step .*there are last, best, 10"):
        checkpoints.choose(which)


def test_choosing_the_best_where_none_was_evaluated(checkpoints, state):
    save(checkpoints, state, 10)
    with pytest.raises(InputError, match=r"step best: no checkpoint was evaluated.* last"):
        checkpoints.choose("best")


@pytest.mark.parametrize("which", ["last", "best", "3"])
def test_choosing_from_nothing(checkpoints, which):
    with pytest.raises(InputError, match="checkpoints: no complete checkpoint"):
        checkpoints.choose(which)


# --- a full disk ----------------------------------------------------------------------------------


@pytest.fixture
def small_disk(tmp_path):
    """A file system of eight megabytes, several checkpoints; needs the right to mount one."""
    folder = tmp_path / "disk"
    folder.mkdir()
    command = ["mount", "-t", "tmpfs", "-o", "size=8m", "tmpfs", str(folder)]
    if os.geteuid() != 0 or subprocess.run(command, capture_output=True).returncode:
        pytest.skip("mounting a small file system needs root")
    yield folder
    subprocess.run(["umount", "-l", str(folder)], check=True)


def fill(folder) -> None:
    """Leave room for a small file, but not for a checkpoint."""
    (folder / "filler").write_bytes(b"x" * (shutil.disk_usage(folder).free - 20_000))


def test_a_disk_too_small_is_told_before(small_disk, state):
    checkpoints = Checkpoints(small_disk / "checkpoints")
    save(checkpoints, state, 1)
    fill(small_disk)
    before = sorted(path.name for path in checkpoints.folder.iterdir())
    with pytest.raises(InputError, match=r"could not be written .*newest good one is step 1\."):
        checkpoints.save(replace(state, step=jnp.int32(2)), CONFIG)
    assert sorted(path.name for path in checkpoints.folder.iterdir()) == before
    (small_disk / "filler").unlink()
    save(checkpoints, state, 2)
    assert checkpoints.steps == [1, 2]
    checkpoints.close()


def test_a_disk_that_fills_up_half_way(small_disk, state, monkeypatch):
    """Another process may take what was free: the save fails, the step before stays good."""
    checkpoints = Checkpoints(small_disk / "checkpoints")
    save(checkpoints, state, 1)
    fill(small_disk)
    monkeypatch.setattr(checkpoint.Checkpoints, "_check_space", lambda self, size: None)
    with pytest.raises(InputError, match=r"could not be written .*newest good one is step 1\."):
        save(checkpoints, state, 2)
    checkpoints.close()
    (small_disk / "filler").unlink()
    again = Checkpoints(small_disk / "checkpoints")
    assert again.latest == 1
    assert_same(again.restore(1, state), replace(state, step=jnp.int32(1)))
    save(again, state, 2)
    assert again.steps == [1, 2]
    again.close()


def test_the_first_save_that_fails_says_that_there_is_none(small_disk, state):
    checkpoints = Checkpoints(small_disk / "checkpoints")
    fill(small_disk)
    with pytest.raises(InputError, match=r"could not be written .*there is no earlier one"):
        checkpoints.save(replace(state, step=jnp.int32(1)), CONFIG)
    checkpoints.close()


# Checkpoints that are damaged.


def flip_bits(step):
    """One in the middle of every file of numbers."""
    for file in (step / "state").rglob("d/*"):
        content = bytearray(file.read_bytes())
        content[len(content) // 2] ^= 1
        file.write_bytes(content)


def lose_the_state(step):
    shutil.rmtree(step / "state")


def cut_a_file(step):
    for file in (step / "state").rglob("*"):
        if file.is_file():
            os.truncate(file, file.stat().st_size // 2)


def change_the_place(step):
    """The next batch is no longer that of the step."""
    (file,) = [
        f for f in (step / "run").rglob("*") if f.is_file() and b"next_batch" in f.read_bytes()
    ]
    file.write_text(re.sub(r'"next_batch": ?3', '"next_batch": 2', file.read_text()))


@pytest.mark.parametrize("damage", [flip_bits, lose_the_state, cut_a_file, change_the_place])
def test_a_damaged_checkpoint_is_set_aside_and_the_one_before_used(checkpoints, state, damage):
    for step in (1, 2, 3):
        save(checkpoints, state, step)
    damage(checkpoints.folder / "step_3")
    again, said = Checkpoints(checkpoints.folder, keep=2), []
    with pytest.raises(InputError, match="step_3: (the checkpoint can't be read|is corrupt)"):
        again.restore(3, state)
    restored = again.restore_newest(state, said.append)
    assert int(restored.step) == 2
    assert said[0].endswith(f"it is kept as {checkpoints.folder / 'corrupt_3'}, and skipped")
    assert said[1] == "carrying on from the checkpoint of step 2"
    save(again, state, 3)
    assert again.steps == [2, 3]
    assert (checkpoints.folder / "corrupt_3").is_dir()
    again.close()


def test_the_newest_record_that_can_be_read(checkpoints, state):
    assert checkpoints.newest_record() is None
    for step in (1, 2):
        checkpoints.save(replace(state, step=jnp.int32(step)), {"data": {"rows": step}})
    checkpoints.wait()
    assert checkpoints.newest_record()["data"] == {"rows": 2, "next_batch": 2}
    shutil.rmtree(checkpoints.folder / "step_2" / "run")
    again = Checkpoints(checkpoints.folder)
    assert again.newest_record()["data"] == {"rows": 1, "next_batch": 1}
    again.close()


def test_none_is_good(checkpoints, state):
    save(checkpoints, state, 1)
    lose_the_state(checkpoints.folder / "step_1")
    again = Checkpoints(checkpoints.folder)
    said = []
    assert again.restore_newest(state, said.append) is state
    assert said[-1] == "no other checkpoint is left: starting from the first step"
    assert again.steps == []
    again.close()


def test_digests_are_the_same_on_every_mesh_and_see_every_bit(untied):
    one, other = (
        state_on(untied, mesh, seed=3) for mesh in (MeshConfig(), MeshConfig(fsdp=2, tensor=4))
    )
    found = digests(flatten(one))
    assert found == digests(flatten(other))
    assert len(set(found.values())) > len(found) // 2
    name, x = max(flatten(one).items(), key=lambda item: item[1].size)
    flat = np.asarray(x).copy().reshape(-1)
    swapped = flat.copy()
    swapped[[0, 1]] = swapped[[1, 0]]
    bit = flat.view(np.uint32).copy()
    bit[5] ^= 1
    for changed in (swapped, bit.view(np.float32)):
        assert digests({name: jnp.asarray(changed.reshape(x.shape))})[name] != found[name]


def test_what_is_only_read_needs_no_optimizer(checkpoints, state):
    """An adapter is opened without the moments that it was trained with."""
    save(checkpoints, state, 1)
    adapters = jax.tree.map(jnp.zeros_like, state.adapters)
    like = TrainState(jnp.int32(0), adapters, opt_state=None)
    with Checkpoints(checkpoints.folder, read_only=True) as opened:
        restored = opened.restore(1, like)
        with pytest.raises(InputError, match=r"step_1: adapters\..* no such array"):
            opened.restore(1, replace(like, adapters={}))
    assert_same(restored, TrainState(jnp.int32(1), state.adapters, opt_state=None))
    with pytest.raises(InputError, match="opt_state"):
        checkpoints.restore(1, like)


def test_orbax_logs_nothing_until_the_checkpoints_are_closed(tmp_path, monkeypatch):
    logger, handler = logging.getLogger("absl"), mock.Mock(level=logging.NOTSET)
    monkeypatch.setattr(logger, "filters", [])  # of checkpoints that another test left open
    logger.addHandler(handler)
    try:
        with Checkpoints(tmp_path / "checkpoints"):
            logger.error("a traceback of a thread")
            handler.handle.assert_not_called()
        logger.error("of somebody else")
        handler.handle.assert_called_once()
    finally:
        logger.removeHandler(handler)
