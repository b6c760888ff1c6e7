"""Checkpoints with Orbax: adapters, optimizer state, step, data position, configuration."""

from __future__ import annotations

import contextlib
import logging
import shutil
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import jax
import orbax.checkpoint as ocp
from orbax.checkpoint import checkpoint_managers as policies

from droplora_jax.errors import InputError
from droplora_jax.step import TrainState


class Checkpoints:
    """The checkpoints of one run: the newest `keep`, and the best by evaluation loss.

    Saving is asynchronous. One that was cut short is never listed: it gets its name when whole.
    """

    def __init__(self, folder: Path, *, keep: int = 2, read_only: bool = False) -> None:
        """`read_only` touches nothing: another process may be saving there."""
        # Orbax logs what it raises, with a traceback from each of its threads.
        logging.getLogger("absl").setLevel(logging.CRITICAL)
        self.folder = folder
        newest = policies.LatestN(keep)
        best = policies.BestN(
            get_metric_fn=_eval_loss, reverse=True, n=1, keep_checkpoints_without_metrics=False
        )
        options = ocp.CheckpointManagerOptions(
            best_fn=_eval_loss,
            best_mode="min",
            preservation_policy=policies.AnyPreservationPolicy([newest, best]),
            cleanup_tmp_directories=not read_only,
            create=not read_only,
            read_only=read_only,
            step_prefix="step",
        )
        self._manager = ocp.CheckpointManager(folder.absolute(), options=options)

    @property
    def steps(self) -> list[int]:
        return sorted(self._manager.all_steps())

    @property
    def latest(self) -> int | None:
        return self._manager.latest_step()

    @property
    def best(self) -> int | None:
        """The step with the lowest evaluation loss, if any was evaluated."""
        return self._manager.best_step() if self.best_loss is not None else None

    @property
    def best_loss(self) -> float | None:
        losses = [self._manager.metrics(step) for step in self.steps]
        return min((loss["eval_loss"] for loss in losses if loss), default=None)

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
                    f"{self.folder}: --step best, but no checkpoint was evaluated (data.valid and "
                    "train.eval_every choose when); use --step last"
                )
            return self.best
        if which not in map(str, steps):
            raise InputError(
                f"{self.folder}: --step {which}: there are last, best, {', '.join(map(str, steps))}"
            )
        return int(which)

    def save(
        self, state: TrainState, record: Mapping[str, Any], eval_loss: float | None = None
    ) -> None:
        """Start saving `state` under its step, with a JSON `record` of the run.

        Raises what went wrong with the save before.
        """
        step = int(state.step)
        flat = _flatten(state)
        self._check_space(sum(leaf.nbytes for leaf in flat.values()))
        run = {"data": {"next_batch": step}, **record}
        with _SaveErrors(self):
            self._manager.save(
                step,
                args=ocp.args.Composite(
                    state=ocp.args.StandardSave(flat), run=ocp.args.JsonSave(run)
                ),
                metrics=None if eval_loss is None else {"eval_loss": eval_loss},
                force=True,
            )

    def restore(self, step: int, like: TrainState) -> TrainState:
        """The state saved at `step`, laid out as `like` is."""
        target = jax.tree.map(
            lambda x: jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=x.sharding), _flatten(like)
        )
        args = ocp.args.Composite(state=ocp.args.StandardRestore(target))
        restored = self._manager.restore(step, args=args)["state"]
        paths, structure = jax.tree.flatten_with_path(like)
        return jax.tree.unflatten(structure, [restored[_name(path)] for path, _ in paths])

    def record(self, step: int) -> dict[str, Any]:
        """What was recorded of the run when it saved `step`, and its place in the data."""
        args = ocp.args.Composite(run=ocp.args.JsonRestore())
        return self._manager.restore(step, args=args)["run"]

    def wait(self) -> None:
        """Return when everything is on disk; raises what went wrong."""
        with _SaveErrors(self):
            self._manager.wait_until_finished()

    def close(self) -> None:
        # What a save in the background raises is `wait`'s to tell.
        with contextlib.suppress(Exception):
            self._manager.close()

    def _check_space(self, size: int) -> None:
        """A full disk is better told before than half-way."""
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


class _SaveErrors:
    """Turns what a failed save raises (a full disk, say) into an InputError."""

    def __init__(self, checkpoints: Checkpoints) -> None:
        self.checkpoints = checkpoints

    def __enter__(self) -> None:
        pass

    def __exit__(self, kind: Any, error: BaseException | None, trace: Any) -> None:
        if error is None or not isinstance(error, Exception):
            return
        reason = next((line for line in str(error).splitlines() if line.strip()), repr(error))
        raise self.checkpoints._failed(reason) from error


def _complete(folder: Path) -> list[int]:
    names = [path.name for path in folder.iterdir()] if folder.is_dir() else []
    return sorted(int(n[5:]) for n in names if n.startswith("step_") and n[5:].isdigit())


def _eval_loss(metrics: Mapping[str, float]) -> float:
    return metrics["eval_loss"]


def _flatten(state: TrainState) -> dict[str, jax.Array]:
    """Every leaf under its path, so that a checkpoint can be read without this code."""
    return {_name(path): leaf for path, leaf in jax.tree.leaves_with_path(state)}


def _name(path: tuple[Any, ...]) -> str:
    parts = (getattr(k, "key", getattr(k, "name", getattr(k, "idx", None))) for k in path)
    return ".".join(str(part) for part in parts if part != "value")
