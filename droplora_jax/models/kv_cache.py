"""The keys and values of positions that a decoder has seen, so that it need not see them again.

Letters: `L` layers, `B` batch, `T` query position, `S` slot, `N` query heads, `K` key/value heads,
`H` head width.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, replace
from functools import partial
from typing import Any

import jax
import jax.numpy as jnp
from jax.sharding import Mesh
from jaxtyping import Array, Float, Int

from droplora_jax.core.sharding import constrain
from droplora_jax.nn.attention.dispatch import cached_attention
from droplora_jax.nn.attention.kernel import AttentionInputs

AXES = ("batch", "heads", None, None)  # logical, for `sharding.RULES`


@partial(
    jax.tree_util.register_dataclass,
    data_fields=["k_LBKHS", "v_LBKSH", "segment_ids_BS", "filled", "layer"],
    meta_fields=["mesh"],
)
@dataclass(frozen=True)
class Cache:
    """Slots for keys and values of every layer, filled from the first on.

    All rows fill the same slots: shorter ones are padded on the left.

    Attributes:
      k_LBKHS, v_LBKSH: the keys, rotated, and the values, each as the product with it is fastest.
        Of a layer by itself they are without L: what is written through another shape of theirs
        is copied on a CPU.
      segment_ids_BS: 0 where there is nothing to see: padding, or not filled yet.
      filled: int32 [], the slots that are filled.
      layer: int32 [], the layer whose turn it is.
      mesh: where they lie: rows over the axes of the batch, heads over `tensor`.
    """

    k_LBKHS: Any
    v_LBKSH: Any
    segment_ids_BS: Any
    filled: Any
    layer: Any
    mesh: Mesh | None

    @classmethod
    def empty(
        cls, layers: int, rows: int, kv_heads: int, slots: int, head_dim: int, *, dtype: Any, mesh
    ) -> Cache:
        stack = () if layers == 1 else (layers,)
        k_LBKHS = _placed(jnp.zeros((*stack, rows, kv_heads, head_dim, slots), dtype), mesh)
        v_LBKSH = _placed(jnp.zeros((*stack, rows, kv_heads, slots, head_dim), dtype), mesh)
        segment_ids_BS, zero = jnp.zeros((rows, slots), jnp.int32), jnp.zeros((), jnp.int32)
        return cls(k_LBKHS, v_LBKSH, segment_ids_BS, zero, zero, mesh)

    def opened(self, segment_ids_BT: Int[Array, "B T"]) -> Cache:
        """With the next T slots of every row taken, for the layers to fill one after the other."""
        start = (jnp.zeros((), jnp.int32), self.filled)
        segment_ids_BS = jax.lax.dynamic_update_slice(self.segment_ids_BS, segment_ids_BT, start)
        return replace(self, segment_ids_BS=segment_ids_BS, layer=jnp.zeros((), jnp.int32))

    def closed(self, length: int) -> Cache:
        """After the last layer."""
        return replace(self, filled=self.filled + length)

    def attend(
        self, inputs: AttentionInputs, attention: Callable[[AttentionInputs], Array]
    ) -> tuple[Float[Array, "B T N H"], Cache]:
        """Attention of one layer's next positions to all so far; their keys and values are kept.

        T is 1, or the cache is empty. Then there is nothing before the positions, and `attention`
        is called with them alone.
        """
        q_BTNH, k_BTKH, v_BTKH, _, window = inputs
        k_LBKHS = self._with(self.k_LBKHS, jnp.moveaxis(k_BTKH, 1, 3), axis=3)
        v_LBKSH = self._with(self.v_LBKSH, jnp.moveaxis(v_BTKH, 1, 2), axis=2)
        kept = replace(self, k_LBKHS=k_LBKHS, v_LBKSH=v_LBKSH, layer=self.layer + 1)
        if q_BTNH.shape[1] > 1:
            return attention(inputs), kept
        k_BKHS, v_BKSH = (x if x.ndim == 4 else x[self.layer] for x in (k_LBKHS, v_LBKSH))
        y = cached_attention(q_BTNH, k_BKHS, v_BKSH, self.segment_ids_BS, self.filled, window)
        return y, kept

    def _with(self, kept: Array, new: Array, axis: int) -> Array:
        """The next slots of this layer, along `axis`, filled."""
        start = [jnp.zeros((), jnp.int32)] * 4
        start[axis] = self.filled
        new = new.astype(kept.dtype)
        if kept.ndim == 5:
            new, start = new[None], [self.layer, *start]
        return _placed(jax.lax.dynamic_update_slice(kept, new, start), self.mesh)


def _placed(kept: Array, mesh: Mesh | None) -> Array:
    return constrain(kept, AXES if kept.ndim == 4 else ("layers", *AXES), mesh)
