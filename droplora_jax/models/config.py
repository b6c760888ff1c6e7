"""What a decoder looks like, where its weights came from, and how they lie on a mesh."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from types import MappingProxyType

import jax.numpy as jnp
from jaxtyping import Array, Int

from droplora_jax.nn import rope

SEES_ALL = 2**30  # a window wider than any row

# The logical axes of every parameter, for `sharding.RULES`.
LOGICAL_AXES: MappingProxyType[str, tuple[str, ...]] = MappingProxyType(
    {
        "embed.embedding": ("vocab", "width"),
        "layers.attention_norm.scale": ("layers", "norm"),
        "layers.q_proj.kernel": ("layers", "width", "heads"),
        "layers.q_proj.bias": ("layers", "heads"),
        "layers.k_proj.kernel": ("layers", "width", "heads"),
        "layers.k_proj.bias": ("layers", "heads"),
        "layers.v_proj.kernel": ("layers", "width", "heads"),
        "layers.v_proj.bias": ("layers", "heads"),
        "layers.q_norm.scale": ("layers", "norm"),
        "layers.k_norm.scale": ("layers", "norm"),
        "layers.o_proj.kernel": ("layers", "heads", "width"),
        "layers.o_proj.bias": ("layers", "norm"),
        "layers.mlp_norm.scale": ("layers", "norm"),
        "layers.gate_proj.kernel": ("layers", "width", "ffn"),
        "layers.gate_proj.bias": ("layers", "ffn"),
        "layers.up_proj.kernel": ("layers", "width", "ffn"),
        "layers.up_proj.bias": ("layers", "ffn"),
        "layers.down_proj.kernel": ("layers", "ffn", "width"),
        "layers.down_proj.bias": ("layers", "norm"),
        "final_norm.scale": ("norm",),
        "lm_head.kernel": ("width", "vocab"),
    }
)


@dataclass(frozen=True)
class Source:
    """Where the weights came from.

    Attributes:
      path: a folder, the URL of one on a bucket, or a hub id.
      folder: the local folder that it was resolved to.
      revision: the commit of a hub id.
    """

    path: str
    folder: Path
    revision: str | None = None


@dataclass(frozen=True)
class ModelConfig:
    """The shape of a decoder, and the family (`FAMILIES`) that it is read and written as.

    Attributes:
      qkv_bias, o_bias, mlp_bias: which projections have a bias.
      qk_norm: queries and keys are normed head by head before they are rotated.
      windows: of each layer, how many positions it sees, itself included; None sees all of them.
    """

    family: str
    vocab_size: int
    width: int
    layers: int
    heads: int
    kv_heads: int
    head_dim: int
    ffn: int
    norm_epsilon: float
    rope: rope.RopeConfig
    tie_embeddings: bool
    max_positions: int
    qkv_bias: bool = False
    o_bias: bool = False
    mlp_bias: bool = False
    qk_norm: bool = False
    windows: tuple[int | None, ...] = ()

    @property
    def distinct_windows(self) -> tuple[int, ...]:
        """Those in `windows_L`."""
        return tuple(sorted({window or SEES_ALL for window in self.windows}))

    @property
    def windows_L(self) -> Int[Array, "L"] | None:
        """The windows as an array; None where every layer sees everything."""
        if not any(self.windows):
            return None
        return jnp.asarray([window or SEES_ALL for window in self.windows], jnp.int32)
