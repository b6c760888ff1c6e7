"""Accelerators that are not here: their devices, to compile for, and what they are made of."""

from __future__ import annotations

import contextlib
import math
import os
import re
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass

import jax

from droplora_jax.core.errors import InputError, first_line

GIB = 2**30


@dataclass(frozen=True)
class Device:
    """What one JAX device of a kind has (a chip, or half of one), by its maker's documentation.

    Attributes:
      platform: as JAX calls it.
      topology: the name of its kind for the compiler.
      chip_config: how the compiler divides a chip into devices; None for its default.
      flops: bfloat16 operations a second in the matrix units.
      memory: bytes.
      bandwidth: bytes a second between memory and the units.
      link: bytes a second, in and out together, over all links to other chips of the slice.
      network: bytes a second, in, from other slices; None where it is not documented.
      per_chip: devices that a chip is.
      dimensions: of the torus.
    """

    platform: str
    topology: str
    flops: float
    memory: int
    bandwidth: float
    link: float
    network: float | None = None
    per_chip: int = 1
    dimensions: int = 2
    chip_config: str | None = None


# Cloud TPU documentation, "TPU architecture" and the pages of each version; the network's is a
# pod's by its chips. The two cores of a v4 chip are one device, as JAX has them on a v4 machine. A
# 7x's figures are halved, as two devices make a chip. CPU: no figures, only shapes and collectives.
KINDS = {
    "v4": Device(
        "tpu", "v4", 275e12, 32 * GIB, 1228e9, 600e9, dimensions=3, chip_config="megacore"
    ),
    "v5e": Device("tpu", "v5e", 197e12, 16 * GIB, 819e9, 400e9, 3.125e9),
    "v5p": Device("tpu", "v5p", 459e12, 95 * GIB, 2765e9, 1200e9, 6.25e9, dimensions=3),
    "v6e": Device("tpu", "v6e", 918e12, 32 * GIB, 1640e9, 800e9, 12.5e9),
    "7x": Device("tpu", "tpu7x", 1153.5e12, 96 * GIB, 3690e9, 600e9, per_chip=2, dimensions=3),
}
# Environment of the TPU compiler on a machine without a TPU: it asks no machine for its metadata,
# several plans may run at once, and messages about missing hardware are not shown.
_COMPILER_ALONE = {
    "TPU_SKIP_MDS_QUERY": "1",
    "ALLOW_MULTIPLE_LIBTPU_LOAD": "1",
    "TPU_WORKER_HOSTNAMES": "localhost",
    "TPU_ACCELERATOR_TYPE": "v5litepod-8",
    "TPU_STDERR_LOG_LEVEL": "3",
    "TPU_MIN_LOG_LEVEL": "3",
}
FORM = re.compile(r"(?:(\d+)x)?(v4|v5e|v5p|v6e|7x):(\d+(?:x\d+)*)")


@dataclass(frozen=True)
class Topology:
    """Devices to compile for.

    Attributes:
      kind: None for a CPU.
      slices: that the devices are in.
    """

    name: str
    devices: Sequence[jax.Device]
    kind: Device | None
    slices: int = 1

    @property
    def platform(self) -> str:
        return self.kind.platform if self.kind else "cpu"


def topology(name: str) -> Topology:
    """The devices of `v5e:4x4`, `2xv5e:16x16` (two slices) or `cpu:8`, none of which is needed.

    Raises:
      InputError: a name that means nothing, or no compiler for it here.
    """
    if match := re.fullmatch(r"cpu:(\d+)", name):
        return Topology(name, _cpu_devices(int(match.group(1))), None)
    match = FORM.fullmatch(name)
    if not match:
        raise InputError(
            f"--topology {name}: must be a kind and its shape, such as v5e:4x4, v5p:4x4x4 or "
            f"2xv5e:16x16 (two slices); kinds: {', '.join(KINDS)}, and cpu:N"
        )
    slices, kind_name, shape = match.groups()
    kind = KINDS[kind_name]
    options: dict[str, int | str | tuple[int, ...]] = {"num_slices": int(slices)} if slices else {}
    if kind.chip_config is not None:
        options["chip_config_name"] = kind.chip_config
    if math.prod(map(int, shape.split("x"))) == 1:
        options["chips_per_host_bounds"] = (1, 1, 1)
    sizes = shape.split("x")
    sizes += ["1"] * (kind.dimensions - len(sizes))
    devices = _tpu_devices(name, f"{kind.topology}:{'x'.join(sizes)}", options)
    return Topology(name, devices, kind, int(slices or 1))


def _tpu_devices(
    name: str, full: str, options: Mapping[str, int | str | tuple[int, ...]]
) -> Sequence[jax.Device]:
    from jax.experimental import topologies

    try:
        with _environment(_COMPILER_ALONE):
            topology = topologies.get_topology_desc(platform="tpu", topology_name=full, **options)
            return topology.devices
    except Exception as error:
        raise InputError(
            f"--topology {name}: the TPU compiler can't make it ({first_line(error)}). It needs "
            "libtpu (pip install 'jax[tpu]'), and a shape that such a slice has"
        ) from error


@contextlib.contextmanager
def _environment(variables: Mapping[str, str]) -> Iterator[None]:
    """Sets the variables that are not set, for the block."""
    added = {name: value for name, value in variables.items() if name not in os.environ}
    os.environ.update(added)
    try:
        yield
    finally:
        for name in added:
            del os.environ[name]


def _cpu_devices(count: int) -> Sequence[jax.Device]:
    # The number of CPU devices holds for the whole process; one that was asked for stays.
    if "xla_force_host_platform_device_count" not in os.environ.get("XLA_FLAGS", ""):
        with contextlib.suppress(RuntimeError):  # JAX has started: its devices have to do
            jax.config.update("jax_num_cpu_devices", count)
    devices = jax.devices("cpu")
    if len(devices) < count:
        raise InputError(
            f"--topology cpu:{count}: {len(devices)} CPU device(s) here. Start it with "
            f"XLA_FLAGS=--xla_force_host_platform_device_count={count}"
        )
    return devices[:count]
