"""The shape of a decoder, and where its weights came from."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

import jax.numpy as jnp
from jaxtyping import Array, Int

from droplora_jax.nn import rope

SEES_ALL = 2**30  # a window wider than any row


@dataclass(frozen=True)
class OtherTensor:
    """A tensor of a model that is not where its name says.

    Attributes:
      name: what it is in the model.
      stored_as: its name where it is stored.
      file: the safetensors file that it is in; None: one of the model's own folder.
    """

    name: str
    stored_as: str
    file: Path | None = None


@dataclass(frozen=True)
class AddedTokens:
    """Special tokens that a base gets beside its own, and the rows of its tables for them.

    Attributes:
      texts: in the order in which the tokenizer gets them.
      tables: the tensors that have a row for each token.
      first, stop: which of their rows are the mean of the rows before; the tables have at least
        `stop` rows.
    """

    texts: tuple[str, ...]
    tables: tuple[str, ...]
    first: int
    stop: int


@dataclass(frozen=True)
class Source:
    """Where the weights came from.

    Attributes:
      path: a folder, the URL of one on a bucket, or a hub id.
      folder: the local folder that it was resolved to.
      revision: the commit of a hub id.
      others: tensors in place of the folder's, or beside them: those of an adapter that was trained
        on a base with other ends.
      tokenizer: the folder of an adapter that brings files of a tokenizer.
      ignored_config_keys: keys of its `config.json` that a user knows to change nothing.
      added: special tokens beside those of its tokenizer, with rows in its tables.
    """

    path: str
    folder: Path
    revision: str | None = None
    others: tuple[OtherTensor, ...] = ()
    tokenizer: Path | None = None
    ignored_config_keys: tuple[str, ...] = ()
    added: AddedTokens | None = None


@dataclass(frozen=True)
class ModelConfig:
    """The shape of a decoder, and the family (`FAMILIES`) that it is read and written as.

    Attributes:
      qkv_bias, o_bias, mlp_bias: which projections have a bias.
      qk_norm: queries and keys are normed head by head before they are rotated.
      windows: for each layer, how many positions a position sees, itself included; None: all.
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
    def has_head(self) -> bool:
        """Whether the output projection has a kernel of its own."""
        return not self.tie_embeddings

    @property
    def distinct_windows(self) -> tuple[int, ...]:
        """The values in `windows_L`."""
        return tuple(sorted({window or SEES_ALL for window in self.windows}))

    @property
    def windows_L(self) -> Int[Array, "L"] | None:
        """The windows as an array; None where every layer sees everything."""
        if not any(self.windows):
            return None
        return jnp.asarray([window or SEES_ALL for window in self.windows], jnp.int32)
