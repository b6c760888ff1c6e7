"""Rotary position embeddings and the frequency scalings of the LLaMA family.

Source: RoFormer (arXiv 2104.09864); `linear` is position interpolation (arXiv 2306.15595), `llama3`
the piecewise scaling of the LLaMA 3.1 report (arXiv 2407.21783), `yarn` arXiv 2309.00071, `dynamic`
its section 3.3. Letters: `H` head width.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from types import MappingProxyType

import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Float, Int

Parameters = tuple[tuple[str, float], ...]
Length = Int[Array, ""] | int
Frequencies = np.ndarray | Array  # [H / 2], float32; a JAX array if they depend on the positions


@dataclass(frozen=True)
class RopeConfig:
    """Base, scaling kind and the parameters of that kind (by their Hugging Face names)."""

    theta: float = 10_000.0
    kind: str = "default"
    parameters: Parameters = field(default=())


def inverse_frequencies(config: RopeConfig, head_dim: int, length: Length = 0) -> Frequencies:
    """Angular step per position of each pair of dimensions: [H / 2], float32.

    `length` is the length of the longest row; only `dynamic` depends on it.
    """
    scale = SCALINGS[config.kind].frequencies
    return scale(config.theta, head_dim, dict(config.parameters), length)


def rotation_tables(
    config: RopeConfig, head_dim: int, positions_BT: Int[Array, "B T"]
) -> tuple[Float[Array, "B T H2"], Float[Array, "B T H2"]]:
    """Cosine and sine of every position's angles, in float32: two arrays [B, T, H / 2]."""
    frequencies = inverse_frequencies(config, head_dim, jnp.max(positions_BT) + 1)
    angles = positions_BT[..., None].astype(jnp.float32) * frequencies
    magnitude = SCALINGS[config.kind].magnitude(dict(config.parameters))
    return jnp.cos(angles) * magnitude, jnp.sin(angles) * magnitude


def longest_static(config: RopeConfig, length: int) -> int:
    """How many of `length` positions a row may have before the tables depend on its length."""
    given = dict(config.parameters)
    return (
        min(length, int(given["max_position_embeddings"])) if config.kind == "dynamic" else length
    )


def rotate(
    x_BTNH: Float[Array, "B T N H"], cos: Float[Array, "B T H2"], sin: Float[Array, "B T H2"]
) -> Float[Array, "B T N H"]:
    """Rotate the pairs (i, i + H / 2) of every head, in the dtype of `x`."""
    cos, sin = (table[:, :, None, :].astype(x_BTNH.dtype) for table in (cos, sin))
    first, second = jnp.split(x_BTNH, 2, axis=-1)
    return jnp.concatenate([first * cos - second * sin, second * cos + first * sin], axis=-1)


def _exponents(head_dim: int) -> np.ndarray:
    return np.arange(0, head_dim, 2, dtype=np.float32) / np.float32(head_dim)


def _default(theta: float, head_dim: int, _: Mapping, length: Length) -> Frequencies:
    return (1.0 / np.power(np.float32(theta), _exponents(head_dim))).astype(np.float32)


def _linear(theta: float, head_dim: int, given: Mapping, length: Length) -> Frequencies:
    return _default(theta, head_dim, given, length) / np.float32(given["factor"])


def _llama3(theta: float, head_dim: int, given: Mapping, length: Length) -> Frequencies:
    frequencies = _default(theta, head_dim, given, length)
    low, high = given["low_freq_factor"], given["high_freq_factor"]
    wavelengths = 2 * math.pi / frequencies
    # 0 for waves longer than the original context, 1 for short ones, linear in between.
    original = given["original_max_position_embeddings"]
    smooth = np.clip((original / wavelengths - low) / (high - low), 0, 1)
    blended = (1 - smooth) * frequencies / np.float32(given["factor"]) + smooth * frequencies
    return blended.astype(np.float32)


def _dynamic(theta: float, head_dim: int, given: Mapping, length: Length) -> Frequencies:
    original, factor = given["max_position_embeddings"], given["factor"]
    longest = jnp.maximum(length, int(original)).astype(jnp.float32)
    stretch = factor * longest / original - (factor - 1)
    base = theta * stretch ** (head_dim / (head_dim - 2))
    return 1.0 / base ** jnp.asarray(_exponents(head_dim))


def _yarn(theta: float, head_dim: int, given: Mapping, length: Length) -> Frequencies:
    frequencies = _default(theta, head_dim, given, length)
    original = given["original_max_position_embeddings"]

    def dimension(rotations: float) -> float:
        """The pair of dimensions that makes so many rotations within the original context."""
        waves = original / (rotations * 2 * math.pi)
        return head_dim * math.log(waves) / (2 * math.log(theta))

    first, last = dimension(given.get("beta_fast", 32)), dimension(given.get("beta_slow", 1))
    if given.get("truncate", True):
        first, last = math.floor(first), math.ceil(last)
    first, last = max(first, 0), min(last, head_dim - 1)
    pairs = np.arange(head_dim // 2, dtype=np.float32)
    # 0 for pairs that are left as they are, 1 for those whose positions are interpolated.
    ramp = np.clip((pairs - first) / (last - first or 1e-3), 0, 1)
    return (frequencies / given["factor"] * ramp + frequencies * (1 - ramp)).astype(np.float32)


def _yarn_magnitude(given: Mapping) -> float:
    if "attention_factor" in given:
        return given["attention_factor"]

    def magnitude(weight: float) -> float:
        return 0.1 * weight * math.log(given["factor"]) + 1.0 if given["factor"] > 1 else 1.0

    if given.get("mscale") and given.get("mscale_all_dim"):
        return magnitude(given["mscale"]) / magnitude(given["mscale_all_dim"])
    return magnitude(1.0)


@dataclass(frozen=True)
class Scaling:
    """One kind of scaling: its functions, and the parameters that it requires or accepts."""

    frequencies: Callable[[float, int, Mapping, Length], Frequencies]
    required: tuple[str, ...] = ()
    optional: tuple[str, ...] = ()
    magnitude: Callable[[Mapping], float] = lambda _: 1.0  # a factor on cosine and sine


ORIGINAL = "original_max_position_embeddings"

SCALINGS = MappingProxyType(
    {
        "default": Scaling(_default),
        "linear": Scaling(_linear, ("factor",)),
        "dynamic": Scaling(_dynamic, ("factor", "max_position_embeddings"), (ORIGINAL,)),
        "yarn": Scaling(
            _yarn,
            ("factor", ORIGINAL),
            ("attention_factor", "beta_fast", "beta_slow", "mscale", "mscale_all_dim", "truncate"),
            _yarn_magnitude,
        ),
        "llama3": Scaling(_llama3, ("factor", "low_freq_factor", "high_freq_factor", ORIGINAL)),
    }
)
