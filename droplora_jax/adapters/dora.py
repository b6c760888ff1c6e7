"""The options of DoRA with dropped ranks."""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar, Literal

from droplora_jax.adapters.droplora import DropLoRA


@dataclass(frozen=True)
class DoRA(DropLoRA):
    """`DropLoRA` whose kernel is rescaled column by column (arXiv 2402.09353); the same options.

    The mask drops ranks of the branch; the columns' norm is that of the kernel without a mask.

    >>> import jax.numpy as jnp, droplora_jax as dl
    >>> from flax import nnx
    >>> model = nnx.Sequential(nnx.Linear(3, 5, rngs=nnx.Rngs(0)))
    >>> config = dl.DoRA(rank=2, targets="all-linear")
    >>> dl.inject(model, config, key=dl.root_key(0)).layers[0].magnitude.shape
    (5,)
    """

    layer: ClassVar[str] = "droplora_jax.adapters.dora_layer:DoRALinear"

    kind: Literal["dora"] = "dora"  # type: ignore[assignment]
