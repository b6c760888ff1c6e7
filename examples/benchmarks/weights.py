"""The same random weights in every framework, made where they are used, without a file.

A value is a hash of the tensor's name and of the value's place in it, in integers of 32 bits, so
that NumPy, JAX and PyTorch make the same bits on any device. Values have eight significant bits
and a standard deviation of 0.018: bfloat16 holds them exactly.
"""

from __future__ import annotations

import zlib
from typing import Any

import numpy as np

_STEP = 2.0**-13


def value_bits(index: Any, name: str | int) -> Any:
    """From 0 to 255, by the place in a tensor (row-major in Hugging Face's orientation).

    Args:
      index: uint32, or int32 in PyTorch, where products wrap round and shifts keep the sign.
      name: of the tensor, or its `seed`.
    """
    x = index * 0x2C1B3C6D + (name if not isinstance(name, str) else seed(name))
    for factor in (0x297A2D39, 0x2C1B3C6D):
        x = (x ^ ((x >> 15) & 0x1FFFF)) * factor
    return (x >> 24) & 0xFF


def seed(name: str) -> int:
    return zlib.crc32(name.encode()) >> 1


def scaled(bits: Any) -> Any:
    """The values, from their bits in float32."""
    return bits * (2 * _STEP) - 255 * _STEP


def is_norm(name: str) -> bool:
    """The scale of a norm is 1 throughout."""
    return name.endswith("norm.weight")


def numpy_values(name: str, shape: tuple[int, ...]) -> np.ndarray:
    """float32."""
    if is_norm(name):
        return np.ones(shape, np.float32)
    index = np.arange(np.prod(shape), dtype=np.uint32).reshape(shape)
    return scaled(value_bits(index, name).astype(np.float32))
