"""How much device memory a program needs (the compiler's figure), and how much the device has."""

from __future__ import annotations

import re
from collections.abc import Mapping
from types import MappingProxyType
from typing import NamedTuple, Protocol, runtime_checkable

import jax
import numpy as np
from jax.experimental import multihost_utils
from jax.sharding import Mesh
from jax.stages import Compiled as Executable
from jax.stages import Lowered

from droplora_jax.core import distributed

GIB = 2**30
USABLE = 0.95  # of a device's memory: the rest is lost between arrays

# The compiler's own words when a program does not fit.
_USED = re.compile(
    r"Used ([\d.]+)([KMGT]) of [\d.]+[KMGT] hbm"
    r"|required for HLO temporaries \(([\d.]+)([KMGT])\) exceeds"
)
_UNITS = {"K": 2**10, "M": 2**20, "G": 2**30, "T": 2**40}


@runtime_checkable
class MemoryAnalysis(Protocol):
    """Bytes of one device, by the compiler's layout."""

    peak_memory_in_bytes: int
    generated_code_size_in_bytes: int
    argument_size_in_bytes: int
    temp_size_in_bytes: int
    output_size_in_bytes: int
    alias_size_in_bytes: int


class Compiled(NamedTuple):
    """An executable, and the bytes that it takes of one device.

    Attributes:
      executable: None if the compiler refused the program as too large.
    """

    executable: Executable | None
    bytes: int


def compiled(
    lowered: Lowered, platform: str, options: Mapping[str, str] = MappingProxyType({})
) -> Compiled:
    """Compile a program with options of the compiler."""
    try:
        executable = lowered.compile(compiler_options=dict(options))
    except jax.errors.JaxRuntimeError as error:
        used = _used(str(error))
        if used is None:
            raise
        return Compiled(None, used)
    analysis = executable.memory_analysis()
    assert analysis is not None
    return Compiled(executable, _needed(analysis, platform))


def limit(mesh: Mesh) -> int | None:
    """The bytes of a device that a program may take, the least of all devices.

    None where the platform tells no limit. All processes of a run have to call it.
    """
    stats = [device.memory_stats() or {} for device in mesh.local_devices]
    least = min((numbers.get("bytes_limit", 0) for numbers in stats), default=0)
    mib = int(least * USABLE) >> 20
    if distributed.several():
        mib = int(np.min(multihost_utils.process_allgather(np.array(mib, np.int32))))
    return mib << 20 or None


def _used(message: str) -> int | None:
    """Bytes that a program would take, from the compiler's error for one that takes too many."""
    match = _USED.search(message)
    if not match:
        return None
    number, unit = (part for part in match.groups() if part is not None)
    return int(float(number) * _UNITS[unit])


def _needed(analysis: MemoryAnalysis, platform: str) -> int:
    """Bytes of one device.

    On a TPU `temp_size_in_bytes` also counts temporaries that never exist together: a program of
    20 GiB by it is compiled for a chip of 16. The peak is within 2% of what the compiler lays out.
    On a CPU the peak leaves loops out.
    """
    if platform == "tpu":
        return analysis.peak_memory_in_bytes + analysis.generated_code_size_in_bytes
    return (
        analysis.argument_size_in_bytes
        + analysis.temp_size_in_bytes
        + analysis.output_size_in_bytes
        - analysis.alias_size_in_bytes
    )
