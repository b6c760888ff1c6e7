"""The cache of keys and values of the positions that a decoder has computed.

Letters: `L` layers, `B` batch, `T` query position, `S` slot, `N` query heads, `K` key/value heads,
`H` head width.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, replace
from functools import partial

import jax
import jax.numpy as jnp
from jax.sharding import Mesh
from jax.typing import DTypeLike
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

    All rows fill the same slots, so shorter rows are padded on the left.

    Attributes:
      k_LBKHS, v_LBKSH: rotated keys, and values, in the layouts that make their products fastest.
        A single layer's have no L, because a CPU would copy an array that is updated through a
        reshape.
      segment_ids_BS: 0 for slots that nothing sees: padding, or not filled yet.
      filled: int32 [], how many slots are filled.
      layer: int32 [], the layer that is computed next.
      mesh: rows are split over the batch's axes, heads over `tensor`.
    """

    k_LBKHS: Array
    v_LBKSH: Array
    segment_ids_BS: Array
    filled: Array
    layer: Array
    mesh: Mesh | None

    @classmethod
    def empty(
        cls,
        layers: int,
        rows: int,
        kv_heads: int,
        slots: int,
        head_dim: int,
        *,
        dtype: DTypeLike,
        mesh: Mesh | None,
    ) -> Cache:
        """No slot is filled."""
        stack = () if layers == 1 else (layers,)
        k_LBKHS = _placed(jnp.zeros((*stack, rows, kv_heads, head_dim, slots), dtype), mesh)
        v_LBKSH = _placed(jnp.zeros((*stack, rows, kv_heads, slots, head_dim), dtype), mesh)
        segment_ids_BS, zero = jnp.zeros((rows, slots), jnp.int32), jnp.zeros((), jnp.int32)
        return cls(k_LBKHS, v_LBKSH, segment_ids_BS, zero, zero, mesh)

    def opened(self, segment_ids_BT: Int[Array, "B T"]) -> Cache:
        """Before the first layer: the next T slots of every row are taken."""
        start = (jnp.zeros((), jnp.int32), self.filled)
        segment_ids_BS = jax.lax.dynamic_update_slice(self.segment_ids_BS, segment_ids_BT, start)
        return replace(self, segment_ids_BS=segment_ids_BS, layer=jnp.zeros((), jnp.int32))

    def closed(self, length: int) -> Cache:
        """After the last layer: the slots that were taken are filled."""
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
        """`kept` with `new` in this layer's next slots, along `axis`."""
        start = [jnp.zeros((), jnp.int32)] * 4
        start[axis] = self.filled
        new = new.astype(kept.dtype)
        if kept.ndim == 5:
            new, start = new[None], [self.layer, *start]
        return _placed(jax.lax.dynamic_update_slice(kept, new, start), self.mesh)


def _placed(kept: Array, mesh: Mesh | None) -> Array:
    return constrain(kept, AXES if kept.ndim == 4 else ("layers", *AXES), mesh)
