"""One run in several processes, joined by JAX's distributed runtime.

Every process runs the same program on its own devices. Process 0 alone writes files and lines.
"""

from __future__ import annotations

import contextlib
import hashlib
from collections.abc import Mapping

import jax
import jax.numpy as jnp
import numpy as np
from jax.experimental import multihost_utils
from jax.sharding import Mesh, NamedSharding, PartitionSpec

from droplora_jax.core.config import DistributedConfig
from droplora_jax.core.errors import InputError, first_line


def join(config: DistributedConfig) -> None:
    """Join the other processes of the run, if there are any. To be called before JAX starts.

    Raises:
      InputError: the others could not be reached.
    """
    # The training loop handles SIGTERM, as it does SIGINT.
    jax.config.update("jax_enable_preemption_service", False)
    by_hand = config.coordinator is not None
    try:
        jax.distributed.initialize(
            config.coordinator,
            config.num_processes,
            config.process_id,
            cluster_detection_method="deactivate" if by_hand else None,
            heartbeat_timeout_seconds=config.timeout,
            shutdown_timeout_seconds=config.timeout,
        )
    except ValueError as error:
        # Without a cluster the process runs alone, but not where JAX found part of a cluster.
        if by_hand or "coordinator_address" not in str(error):
            raise InputError(
                f"distributed: JAX found a cluster but not all of it ({error}); give "
                "distributed.coordinator, num_processes and process_id"
            ) from error
    except RuntimeError as error:
        if not by_hand and "must be called before" in str(error):
            return  # the program has used JAX already, as a single process
        raise InputError(
            f"distributed.coordinator={config.coordinator!r}: the processes of the run could not "
            f"be joined ({first_line(error)}). All of them have to be started, and to reach "
            "process 0"
        ) from error


def leave() -> None:
    """Wait until the others leave as well, for at most the run's `timeout`."""
    if several():
        with contextlib.suppress(Exception):
            jax.distributed.shutdown()


def several() -> bool:
    """Whether the run has more than one process."""
    return jax.distributed.is_initialized() and jax.process_count() > 1


def first() -> bool:
    """Whether this is the process that writes files and prints."""
    return not several() or jax.process_index() == 0


def name() -> str:
    """The name of this process, for messages."""
    return f"process {jax.process_index()} of {jax.process_count()}"


def wait_for_all(point: str) -> None:
    """Return when every process has reached this point."""
    if several():
        multihost_utils.sync_global_devices(point)


def all_true(here: bool) -> bool:
    """Whether `here` is true in every process."""
    return bool(np.all(multihost_utils.process_allgather(np.array(here)))) if several() else here


def same(here: bytes) -> bool:
    """Whether `here` is the same in every process."""
    if not several():
        return True
    digest = np.frombuffer(hashlib.sha256(here).digest(), np.uint32)
    digests = np.asarray(multihost_utils.process_allgather(digest))
    return bool((digests == digest).all())


def of_first(here: Mapping[str, float]) -> dict[str, float]:
    """The numbers of the first process, in all processes, so that all decide alike."""
    if not several():
        return dict(here)
    halves = np.array(list(here.values()), np.float64).view(np.uint32)  # no 64 bits in JAX
    numbers = np.asarray(multihost_utils.broadcast_one_to_all(halves)).view(np.float64)
    return dict(zip(here, numbers.tolist(), strict=True))


def sum_of_all(here: np.ndarray) -> np.ndarray:
    """The sum over all processes of integers below 2 ** 32."""
    if not several():
        return here
    # JAX has no 64 bits by default.
    halves = np.stack([here & 0xFFFF, here >> 16]).astype(np.uint32)
    sums = np.asarray(multihost_utils.process_allgather(halves)).sum(axis=0, dtype=np.uint64)
    return sums[0] + (sums[1] << np.uint64(16))


def to_host(x: jax.Array) -> np.ndarray:
    """The complete array, in every process; all processes must call this."""
    if x.is_fully_addressable:
        return jax.device_get(x)
    return multihost_utils.process_allgather(x, tiled=True)


class Agreement:
    """The maximum of a number over the processes, the same in all of them.

    With several processes it is the previous step's maximum (0 at first), so that no device waits
    for it.
    """

    def __init__(self, mesh: Mesh) -> None:
        self._sharding = NamedSharding(mesh, PartitionSpec(mesh.axis_names))
        replicated = NamedSharding(mesh, PartitionSpec())
        self._highest = jax.jit(jnp.max, out_shardings=replicated)
        self._pending: jax.Array | None = None

    def __call__(self, number: int) -> int:
        if not several():
            return number
        before = 0 if self._pending is None else int(self._pending)
        local = np.array([number], np.int32)
        shape = (self._sharding.mesh.size,)
        numbers = jax.make_array_from_callback(shape, self._sharding, lambda _: local)
        self._pending = self._highest(numbers)
        return before
