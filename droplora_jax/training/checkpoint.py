"""Checkpoints with Orbax: adapters, optimizer state, step, data position, configuration."""

from __future__ import annotations

import contextlib
import logging
import math
import shutil
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from typing import Any

import jax
import orbax.checkpoint as ocp
from orbax.checkpoint import checkpoint_managers as policies

from droplora_jax.core import distributed
from droplora_jax.core.errors import InputError, first_line
from droplora_jax.core.finite import not_finite
from droplora_jax.training.checksums import digests
from droplora_jax.training.step import TrainState

TEMPORARY = ".orbax-checkpoint-tmp"
_SCORE = "worth"  # the name of the score on disk

Record = dict[str, Any]  # JSON


class Corrupt(InputError):
    """A checkpoint that can't be read, is not what was saved, or is not finite."""


class Checkpoints:
    """The checkpoints of one run: the newest `keep`, and the best of those that were evaluated.

    Saving is asynchronous. A checkpoint gets its name when it is complete, so that one that was cut
    short is never listed. Until `close`, or the end of a `with` block, Orbax logs nothing: it would
    log what it raises, with a traceback from each of its threads.
    """

    def __init__(self, folder: Path, *, keep: int = 2, read_only: bool = False) -> None:
        """
        Args:
          keep: how many of the newest to keep.
          read_only: nothing in the folder is touched, as another process may be saving there; and
            `restore` reads no more arrays than it is asked for.
        """
        self._silence = lambda record: False
        logging.getLogger("absl").addFilter(self._silence)
        self.folder, self._read_only = folder, read_only
        self.unfinished = [path for path in _entries(folder) if TEMPORARY in path.name]
        newest = policies.LatestN(keep)
        best = policies.BestN(get_metric_fn=_score, n=1, keep_checkpoints_without_metrics=False)
        options = ocp.CheckpointManagerOptions(
            best_fn=_score,
            best_mode="max",
            preservation_policy=policies.AnyPreservationPolicy([newest, best]),
            cleanup_tmp_directories=not read_only,
            create=not read_only,
            read_only=read_only,
            step_prefix="step",
        )
        handlers: dict[str, Any] = {
            "state": ocp.PyTreeCheckpointHandler()
            if read_only
            else ocp.StandardCheckpointHandler(),
            "run": ocp.JsonCheckpointHandler(),
        }
        self._manager = ocp.CheckpointManager(
            folder.absolute(), options=options, item_handlers=handlers
        )

    @property
    def steps(self) -> list[int]:
        return sorted(self._manager.all_steps())

    @property
    def latest(self) -> int | None:
        return self._manager.latest_step()

    def newest_saved(self) -> int | None:
        """The newest step, after waiting for a save in the background."""
        self.wait()
        return self.latest

    @property
    def best(self) -> int | None:
        """The step of the highest finite score, the newest of several; None without any."""
        scores = self._scores()
        return max(scores, key=lambda step: (scores[step], step), default=None)

    @property
    def best_score(self) -> float | None:
        """The highest finite score of the checkpoints; None without any."""
        return max(self._scores().values(), default=None)

    def _scores(self) -> dict[int, float]:
        """The finite scores of the checkpoints that were evaluated, by step."""
        metrics = {step: self._manager.metrics(step) for step in self.steps}
        scores = {step: _score(numbers) for step, numbers in metrics.items() if numbers}
        return {step: score for step, score in scores.items() if math.isfinite(score)}

    def choose(self, which: str) -> int:
        """The step that `last`, `best` or a number stands for."""
        steps = self.steps
        if not steps:
            raise InputError(f"{self.folder}: no complete checkpoint in it")
        if which == "last":
            return steps[-1]
        if which == "best":
            if self.best is None:
                raise InputError(
                    f"{self.folder}: step best: no checkpoint was evaluated, which needs examples "
                    "or tasks to evaluate on; take step last"
                )
            return self.best
        if which not in map(str, steps):
            raise InputError(
                f"{self.folder}: step {which}: there are last, best, {', '.join(map(str, steps))}"
            )
        return int(which)

    def save(self, state: TrainState, record: Record, score: float | None = None) -> None:
        """Start saving `state` under its step, with a JSON `record` of the run.

        Args:
          score: the higher, the better the checkpoint; None if it was not evaluated.

        Raises what went wrong with the save before.
        """
        step = int(state.step)
        flat = flatten(state)
        self._check_space(sum(leaf.nbytes for leaf in flat.values()))
        run = {**record, "digests": digests(flat)}
        run["data"] = {**record.get("data", {}), "next_batch": step}
        with self._save_errors():
            self._manager.save(
                step,
                args=ocp.args.Composite(
                    state=ocp.args.StandardSave(flat), run=ocp.args.JsonSave(run)
                ),
                metrics=None if score is None else {_SCORE: score},
                force=True,
            )

    def restore_newest(self, state: TrainState, say: Callable[[str], None]) -> TrainState:
        """The newest good checkpoint's state, laid out as `state` is; `state` if none is good.

        A checkpoint that is `Corrupt` is set aside under another name.

        Raises:
          InputError: a checkpoint of something else.
        """
        for name in self.unfinished:
            say(f"{name} was cut short while it was saved: skipped")
        for step in reversed(self.steps):
            reason, restored = "", None
            try:
                restored = self.restore(step, state)
            except Corrupt as error:
                reason = str(error)
            if distributed.all_true(restored is not None):
                say(f"carrying on from the checkpoint of step {step}")
                assert restored is not None
                return restored
            name = self._set_aside(step)
            say(f"{reason or 'corrupt in another process'}; it is kept as {name}, and skipped")
            if not self.steps:
                say("no other checkpoint is left: starting from the first step")
        return state

    def restore(self, step: int, like: TrainState) -> TrainState:
        """The state saved at `step`, laid out as `like` is.

        Args:
          like: of read-only checkpoints a part of the state that is None, such as `opt_state`, is
            not read.

        Raises:
          Corrupt: it can't be read, is not what was saved, or holds a value that is not finite.
          InputError: it is a checkpoint of something else.
        """
        flat = flatten(like)
        target = jax.tree.map(
            lambda x: jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=x.sharding), flat
        )
        args = ocp.args.Composite(state=self._restore_args(target), run=ocp.args.JsonRestore())
        where = self._path(step)
        with _read_errors(where):
            metadata = self._manager.item_metadata(step)["state"].tree
            absent = {part for part, value in vars(like).items() if value is None}
            left_out = absent if self._read_only else set()
            shapes = {
                name: tuple(leaf.shape)
                for name, leaf in metadata.items()
                if name.partition(".")[0] not in left_out
            }
        if shapes != (needed := {name: leaf.shape for name, leaf in flat.items()}):
            name = min(name for name, _ in shapes.items() ^ needed.items())
            raise InputError(
                f"{where}: {name} is {shapes.get(name, 'missing')} in it, and the run needs "
                f"{needed.get(name, 'no such array')}: a checkpoint of another run, or of another "
                "version of optax. Name another output, or move the checkpoint away"
            )
        with _read_errors(where):
            saved = self._manager.restore(step, args=args)
            restored, recorded = saved["state"], saved["run"]["digests"]
        if bad := sorted(name for name, d in digests(restored).items() if recorded.get(name) != d):
            raise Corrupt(f"{where}: is corrupt ({bad[0]} is not what was saved)")
        if (batch := saved["run"]["data"]["next_batch"]) != int(restored["step"]):
            raise Corrupt(f"{where}: is corrupt (batch {batch} is next after so many steps)")
        if names := not_finite(restored):
            raise Corrupt(f"{where}: {names[0]} in it holds a value that is not finite")
        paths, structure = jax.tree.flatten_with_path(like)
        return jax.tree.unflatten(structure, [restored[_name(path)] for path, _ in paths])

    def _restore_args(
        self, target: Mapping[str, jax.ShapeDtypeStruct]
    ) -> ocp.args.StandardRestore | ocp.args.PyTreeRestore:
        if not self._read_only:
            return ocp.args.StandardRestore(target)
        restore_args = ocp.checkpoint_utils.construct_restore_args(target)
        return ocp.args.PyTreeRestore(target, restore_args=restore_args, partial_restore=True)

    def _path(self, step: int) -> Path:
        return self.folder / f"step_{step}"

    def _set_aside(self, step: int) -> Path:
        aside = self.folder / f"corrupt_{step}"
        number = 1
        while aside.exists():
            number += 1
            aside = self.folder / f"corrupt_{step}_{number}"
        distributed.wait_for_all("a corrupt checkpoint has its other name")
        if distributed.first():
            self._path(step).rename(aside)
        distributed.wait_for_all("a corrupt checkpoint is set aside")
        self._manager.reload()
        return aside

    def record(self, step: int) -> Record:
        """What was recorded of the run when it saved `step`, and its place in the data.

        Raises:
          Corrupt: it can't be read.
        """
        args = ocp.args.Composite(run=ocp.args.JsonRestore())
        with _read_errors(self._path(step)):
            return self._manager.restore(step, args=args)["run"]

    def newest_record(self) -> Record | None:
        """The record of the newest checkpoint that can be read, if there is one."""
        for step in reversed(self.steps):
            with contextlib.suppress(Corrupt):
                return self.record(step)
        return None

    def wait(self) -> None:
        """Return when everything is on disk; raises what went wrong."""
        with self._save_errors():
            self._manager.wait_until_finished()

    def close(self) -> None:
        """End the threads of Orbax; what a save in the background raises is for `wait` to tell."""
        with contextlib.suppress(Exception):
            self._manager.close()
        logging.getLogger("absl").removeFilter(self._silence)

    def __enter__(self) -> Checkpoints:
        return self

    def __exit__(self, *error: object) -> None:
        self.close()

    @contextlib.contextmanager
    def _save_errors(self) -> Iterator[None]:
        """Turns what a failed save raises (a full disk, for example) into an InputError."""
        try:
            yield
        except Exception as error:
            raise self._failed(first_line(error)[:200]) from error

    def _check_space(self, size: int) -> None:
        """Raise InputError for a disk that is too full, before anything is written."""
        needed = int(1.1 * size) + 2**16
        free = shutil.disk_usage(self.folder).free
        if free < needed:
            raise self._failed(f"it needs {needed:,} bytes and the disk has {free:,} left")

    def _failed(self, reason: str) -> InputError:
        return InputError(
            f"{self.folder}: a checkpoint could not be written ({reason}); {self.kept()}. Make "
            "room and run the same command again"
        )

    def kept(self) -> str:
        """Which checkpoint a run can carry on from, in words."""
        good = _complete(self.folder)
        return f"the newest good one is step {good[-1]}" if good else "there is no earlier one"


@contextlib.contextmanager
def _read_errors(where: Path) -> Iterator[None]:
    """Turns whatever a checkpoint that can't be read raises into `Corrupt`."""
    try:
        yield
    except Exception as error:
        reason = first_line(error)[:200]
        raise Corrupt(f"{where}: the checkpoint can't be read ({reason})") from error


def _entries(folder: Path) -> list[Path]:
    return sorted(folder.iterdir()) if folder.is_dir() else []


def _complete(folder: Path) -> list[int]:
    names = [path.name for path in _entries(folder)]
    return sorted(int(n[5:]) for n in names if n.startswith("step_") and n[5:].isdigit())


def _score(metrics: Mapping[str, float]) -> float:
    """The score by which checkpoints are ranked: one that is not finite is below all others."""
    score = metrics[_SCORE]
    return score if math.isfinite(score) else -math.inf


def flatten(state: TrainState) -> dict[str, jax.Array]:
    """Every leaf under its path, so that a checkpoint can be read without this code."""
    return {_name(path): leaf for path, leaf in jax.tree.leaves_with_path(state)}


def _name(path: tuple[Any, ...]) -> str:
    parts = (getattr(k, "key", getattr(k, "name", getattr(k, "idx", None))) for k in path)
    return ".".join(str(part) for part in parts if part != "value")
