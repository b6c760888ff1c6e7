"""Rotary position embeddings and the frequency scalings of the LLaMA family.

Source: RoFormer (arXiv 2104.09864); `linear` is position interpolation (arXiv 2306.15595), `llama3`
the piecewise scaling of the LLaMA 3.1 report (arXiv 2407.21783). Letters: `H` head width.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass, field
from types import MappingProxyType

import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Float, Int

Parameters = tuple[tuple[str, float], ...]


@dataclass(frozen=True)
class RopeConfig:
    """Base, scaling kind and the parameters of that kind (by their Hugging Face names)."""

    theta: float = 10_000.0
    kind: str = "default"
    parameters: Parameters = field(default=())


def inverse_frequencies(config: RopeConfig, head_dim: int) -> np.ndarray:
    """Angular step per position of each pair of dimensions: [H / 2], float32."""
    exponents = np.arange(0, head_dim, 2, dtype=np.float32) / np.float32(head_dim)
    frequencies = (1.0 / np.power(np.float32(config.theta), exponents)).astype(np.float32)
    return SCALINGS[config.kind].scale(frequencies, dict(config.parameters))


def rotation_tables(
    config: RopeConfig, head_dim: int, positions_BT: Int[Array, "B T"]
) -> tuple[Float[Array, "B T H2"], Float[Array, "B T H2"]]:
    """Cosine and sine of every position's angles, in float32: two arrays [B, T, H / 2]."""
    angles = positions_BT[..., None].astype(jnp.float32) * inverse_frequencies(config, head_dim)
    return jnp.cos(angles), jnp.sin(angles)


def rotate(
    x_BTNH: Float[Array, "B T N H"], cos: Float[Array, "B T H2"], sin: Float[Array, "B T H2"]
) -> Float[Array, "B T N H"]:
    """Rotate the pairs (i, i + H / 2) of every head, in the dtype of `x`."""
    cos, sin = (table[:, :, None, :].astype(x_BTNH.dtype) for table in (cos, sin))
    first, second = jnp.split(x_BTNH, 2, axis=-1)
    return jnp.concatenate([first * cos - second * sin, second * cos + first * sin], axis=-1)


def _linear(frequencies: np.ndarray, parameters: dict[str, float]) -> np.ndarray:
    return frequencies / np.float32(parameters["factor"])


def _llama3(frequencies: np.ndarray, parameters: dict[str, float]) -> np.ndarray:
    factor = np.float32(parameters["factor"])
    low, high = parameters["low_freq_factor"], parameters["high_freq_factor"]
    original = parameters["original_max_position_embeddings"]
    wavelengths = 2 * math.pi / frequencies
    # 0 where a wave is longer than the original context, 1 where many fit, linear in between.
    smooth = np.clip((original / wavelengths - low) / (high - low), 0, 1)
    blended = (1 - smooth) * frequencies / factor + smooth * frequencies
    return blended.astype(np.float32)


@dataclass(frozen=True)
class Scaling:
    """One kind: the function, and the parameters that the configuration must give."""

    scale: Callable[[np.ndarray, dict[str, float]], np.ndarray]
    required: tuple[str, ...] = ()


SCALINGS = MappingProxyType(
    {
        "default": Scaling(lambda frequencies, _: frequencies),
        "linear": Scaling(_linear, ("factor",)),
        "llama3": Scaling(
            _llama3,
            (
                "factor",
                "low_freq_factor",
                "high_freq_factor",
                "original_max_position_embeddings",
            ),
        ),
    }
)
