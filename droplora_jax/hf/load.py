"""`dl.load`: a Hugging Face folder to a sharded model."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

import jax
import jax.numpy as jnp
from jax.sharding import Mesh
from jax.typing import DTypeLike

from droplora_jax.core.sharding import make_mesh
from droplora_jax.hf.base import Base
from droplora_jax.models.decoder import Decoder
from droplora_jax.nn.options import Quantization


def load(
    path: str | Path,
    *,
    mesh: Mesh | None = None,
    dtype: DTypeLike = jnp.bfloat16,
    revision: str | None = None,
    ignore_config_keys: Sequence[str] = (),
    quantize: str | Quantization = "none",
    add_tokens: Sequence[str] = (),
) -> Decoder:
    """Load a Hugging Face folder or hub id straight onto the mesh.

    Args:
      path: a folder with `config.json` and safetensors, the URL of one on a bucket (`gs://`,
        `s3://`), or a hub id.
      mesh: where the weights go; default: all local devices along `fsdp`.
      dtype: of the weights and the activations.
      revision: branch, tag or commit of a hub id.
      ignore_config_keys: keys of `config.json` known to change nothing; exports record them.
      quantize: store the linear layers in fewer bits: `int8`, `int4`, `nf4`, or a `Quantization`.
      add_tokens: special tokens to add to the tokenizer, as exports will have it. The row of a new
        token is the mean of the others: train the embedding and the head too.

    Raises:
      InputError: a folder, key or tensor that is missing, broken or not supported.

    >>> import droplora_jax as dl
    >>> from droplora_jax.commands.quickstart import BASE  # a small model in the package
    >>> model = dl.load(BASE, dtype=jnp.float32)
    >>> model(jnp.ones((1, 4), jnp.int32)).shape  # tokens [B, T] to logits [B, T, V]
    (1, 4, 259)
    """
    quantization = quantize if isinstance(quantize, Quantization) else Quantization(quantize)
    base = Base.open(path, revision, ignore_config_keys).with_tokens(add_tokens)
    mesh = mesh or make_mesh(devices=jax.local_devices())
    return base.load(mesh, dtype=dtype, quantization=quantization)
