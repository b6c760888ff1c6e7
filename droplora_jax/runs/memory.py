"""What a program takes of a device's memory, by the compiler's word, and what there is of it."""

from __future__ import annotations

import re
from collections.abc import Mapping
from types import MappingProxyType
from typing import Any, NamedTuple

import jax
import numpy as np
from jax.experimental import multihost_utils
from jax.sharding import Mesh

from droplora_jax.core import distributed

GIB = 2**30
USABLE = 0.95  # of a device's memory: the rest is lost between arrays

# The compiler's own words when a program does not fit.
_USED = re.compile(
    r"Used ([\d.]+)([KMGT]) of [\d.]+[KMGT] hbm"
    r"|required for HLO temporaries \(([\d.]+)([KMGT])\) exceeds"
)
_UNITS = {"K": 2**10, "M": 2**20, "G": 2**30, "T": 2**40}


class Compiled(NamedTuple):
    """An executable, None if the compiler refused it as too large; and a device's bytes for it."""

    executable: Any
    bytes: int


def compiled(
    lowered: Any, platform: str, options: Mapping[str, str] = MappingProxyType({})
) -> Compiled:
    """A program, compiled with some of the compiler's options, and what it takes."""
    try:
        executable = lowered.compile(compiler_options=dict(options))
    except jax.errors.JaxRuntimeError as error:
        used = _used(str(error))
        if used is None:
            raise
        return Compiled(None, used)
    return Compiled(executable, _needed(executable.memory_analysis(), platform))


def limit(mesh: Mesh) -> int | None:
    """The bytes of a device that a program may take, the least of all; None where none is told.

    Of several processes all have to ask.
    """
    stats = [device.memory_stats() or {} for device in mesh.local_devices]
    least = min((of_device.get("bytes_limit", 0) for of_device in stats), default=0)
    mib = int(least * USABLE) >> 20
    if distributed.several():
        mib = int(np.min(multihost_utils.process_allgather(np.array(mib, np.int32))))
    return mib << 20 or None


def _used(message: str) -> int | None:
    """Bytes that a program would take, in the compiler's words for one that takes too many."""
    found = _USED.search(message)
    if not found:
        return None
    number, unit = (part for part in found.groups() if part is not None)
    return int(float(number) * _UNITS[unit])


def _needed(analysis: Any, platform: str) -> int:
    """Bytes of one device.

    A TPU's compiler counts temporaries that are never there together as if they were: a program
    of 20 GiB by `temp_size_in_bytes` is compiled for a chip of 16. Its peak is within 2% of what
    it lays out. That of a CPU leaves loops out.
    """
    if platform == "tpu":
        return analysis.peak_memory_in_bytes + analysis.generated_code_size_in_bytes
    return (
        analysis.argument_size_in_bytes
        + analysis.temp_size_in_bytes
        + analysis.output_size_in_bytes
        - analysis.alias_size_in_bytes
    )
