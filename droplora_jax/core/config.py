"""Options of a run's mesh and processes, and names of schedules; no JAX is imported here."""

from __future__ import annotations

import re
from collections.abc import Iterator
from dataclasses import dataclass, fields
from typing import Literal

from droplora_jax.core.errors import raise_all

Schedule = Literal["constant", "linear", "cosine"]  # what follows a warm-up


@dataclass(frozen=True)
class MeshConfig:
    """Devices along each mesh axis; -1 (one axis at most) takes what is left.

    Attributes:
      replica: copies of everything, in slices or hosts between which the network is slow.
      data: copies of the weights, each for its own examples.
      fsdp: examples, and weights that are gathered layer by layer.
      tensor: heads, feed-forward width, vocabulary.
      context: positions of a sequence; weights too, as over `fsdp`.

    >>> MeshConfig(replica=2, tensor=4).fsdp  # what is left
    -1
    """

    replica: int = 1
    data: int = 1
    fsdp: int = -1
    tensor: int = 1
    context: int = 1

    def __post_init__(self) -> None:
        raise_all(self._problems())

    def _problems(self) -> Iterator[str]:
        sizes = {field.name: getattr(self, field.name) for field in fields(self)}
        for name, size in sizes.items():
            if size < 1 and size != -1:
                yield f"{name}={size}: must be positive, or -1 for the rest"
        open_axes = [name for name, size in sizes.items() if size == -1]
        if len(open_axes) > 1:
            yield (
                f"{open_axes[0]}=-1: only one axis may be -1 (what is left), and "
                f"{', '.join(open_axes[1:])} is too"
            )

    @property
    def sizes(self) -> tuple[int, ...]:
        """The sizes in the order of the mesh's axes."""
        return tuple(getattr(self, field.name) for field in fields(self))


@dataclass(frozen=True)
class DistributedConfig:
    """How the processes of a run find each other.

    On a TPU slice, under SLURM, Open MPI and on Kubernetes JAX finds out by itself; elsewhere the
    first three are all needed, `process_id` best on the command line.

    Attributes:
      coordinator: host:port of process 0.
      num_processes: the number of processes.
      process_id: the number of this process, from 0.
      timeout: seconds after which a process that is silent counts as gone; JAX then ends the
        others, and says so.
    """

    coordinator: str | None = None
    num_processes: int | None = None
    process_id: int | None = None
    timeout: int = 60

    def __post_init__(self) -> None:
        raise_all(self._problems())

    def _problems(self) -> Iterator[str]:
        by_hand = {
            "coordinator": self.coordinator,
            "num_processes": self.num_processes,
            "process_id": self.process_id,
        }
        missing = [name for name, value in by_hand.items() if value is None]
        if 0 < len(missing) < len(by_hand):
            yield (
                f"{missing[0]} is missing: give coordinator, num_processes and process_id, or none "
                "of them where JAX finds the cluster out by itself"
            )
        if self.coordinator is not None and not re.fullmatch(r".+:\d+", self.coordinator):
            yield f"coordinator={self.coordinator!r}: must be host:port of process 0"
        count, number = self.num_processes, self.process_id
        if count is not None and count < 1:
            yield f"num_processes={count}: must be at least 1"
        elif count is not None and number is not None and not 0 <= number < count:
            yield f"process_id={number}: must be from 0 to {count - 1}, below num_processes={count}"
        if self.timeout < 10:
            yield f"timeout={self.timeout}: must be at least 10 seconds"
