"""Everything of a run that is checked and built before a weight is loaded."""

from __future__ import annotations

from jax.sharding import Mesh

from droplora_jax.core.errors import InputError
from droplora_jax.core.sharding import RULES, axis_size
from droplora_jax.runs.config import RunConfig


def check_mesh(config: RunConfig, mesh: Mesh) -> None:
    """Raise InputError unless every device of the mesh gets equal parts of a batch.

    And for `remat=offload` on a CPU, which has nowhere to offload to.
    """
    train, length = config.train, config.data.max_length
    if train.remat == "offload" and mesh.devices.flat[0].platform == "cpu":
        raise InputError(
            "train.remat='offload': a CPU has no memory beside the host's; take 'dots', or an "
            "accelerator"
        )
    parts = axis_size(mesh, RULES["batch"] or ())
    if train.rows_per_pass % parts:
        name = "micro_batch" if train.micro_batch else "global_batch"
        raise InputError(
            f"train.{name}={train.rows_per_pass} is not divisible by the {parts} parts that the "
            f"mesh splits rows into (replica x data x fsdp); make it a multiple of {parts}, or "
            "change the mesh"
        )
    if length % (parts := mesh.shape["context"] ** 2):
        raise InputError(
            f"data.max_length={length} is not divisible by {parts}, the square of "
            f"mesh.context={mesh.shape['context']} (each of so many devices attends with a "
            f"part of every other's positions); make it a multiple of {parts}"
        )
