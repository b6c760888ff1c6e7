"""One decoder for every family: its configuration says which.

Layers are stacked along a leading axis `L` and run by a scan, so compile time does not grow with
depth and the compiler gathers sharded weights one layer at a time. Letters: `B` batch, `T`
position, `D` width, `N` query heads, `K` key/value heads, `H` head width, `F` feed-forward width,
`V` vocabulary, `L` layers.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from types import MappingProxyType
from typing import Any, Literal, cast

import jax
import jax.numpy as jnp
from flax import nnx
from jax.ad_checkpoint import checkpoint_name
from jax.sharding import Mesh
from jaxtyping import Array, Float, Int

from droplora_jax import ops, rope
from droplora_jax.attention import attention
from droplora_jax.embedding import embed
from droplora_jax.models.cache import Cache
from droplora_jax.sharding import axis_size, constrain, divides
from droplora_jax.shared import apply_all

# What the forward pass of a layer saves for its backward pass: all of it; what costs more to find
# again than to keep (products that are read again, and masks); or only its input.
Remat = Literal["everything", "dots", "nothing"]

SEES_ALL = 2**30  # a window wider than any row

# The names are those given with `checkpoint_name`, here, in `lowrank` and in `attention`.
REMAT_POLICIES = MappingProxyType(
    {
        "dots": jax.checkpoint_policies.save_only_these_names("dots", "attention"),
        "nothing": jax.checkpoint_policies.nothing_saveable,
    }
)

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
    """Where the weights came from: a folder, or a hub id at a revision."""

    path: str
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
    def windows_L(self) -> Int[Array, "L"] | None:
        """The windows as an array; None where every layer sees everything."""
        if not any(self.windows):
            return None
        return jnp.asarray([window or SEES_ALL for window in self.windows], jnp.int32)


class RMSNorm(nnx.Module):
    def __init__(self, width: int, epsilon: float, *, dtype: Any) -> None:
        self.scale = nnx.Param(jnp.ones((width,), dtype))
        self.epsilon = epsilon

    def __call__(self, x: Float[Array, "*x D"]) -> Float[Array, "*x D"]:
        return ops.rms_norm(x, self.scale[...], self.epsilon)


class Head(nnx.Module):
    """The output projection; no `nnx.Linear`, so `all-linear` leaves it alone as PEFT does."""

    def __init__(self, width: int, vocab_size: int, *, dtype: Any, rngs: nnx.Rngs) -> None:
        init = nnx.initializers.normal(width**-0.5)
        self.kernel = nnx.Param(init(rngs.params(), (width, vocab_size), dtype))

    def __call__(self, x_BTD: Float[Array, "B T D"]) -> Float[Array, "B T V"]:
        return x_BTD @ self.kernel[...].astype(x_BTD.dtype)


def _as_input(arrays: tuple[Any, ...], **_: Any) -> Any:
    """The computation is in the dtype of the activations, whatever that of a trained parameter."""
    x, *rest = arrays
    return (x, *(None if y is None else y.astype(x.dtype) for y in rest))


class Layer(nnx.Module):
    """Attention and SwiGLU, each behind a norm and a residual."""

    def __init__(self, config: ModelConfig, *, dtype: Any, mesh: Mesh | None, rngs: nnx.Rngs):
        def linear(features_in: int, features_out: int, bias: bool) -> nnx.Linear:
            return nnx.Linear(
                features_in,
                features_out,
                use_bias=bias,
                param_dtype=dtype,
                promote_dtype=cast(Any, _as_input),
                rngs=rngs,
            )

        c = config
        self.config, self.mesh = config, mesh
        self.attention_norm = RMSNorm(c.width, c.norm_epsilon, dtype=dtype)
        self.q_proj = linear(c.width, c.heads * c.head_dim, c.qkv_bias)
        self.k_proj = linear(c.width, c.kv_heads * c.head_dim, c.qkv_bias)
        self.v_proj = linear(c.width, c.kv_heads * c.head_dim, c.qkv_bias)
        if c.qk_norm:
            self.q_norm = RMSNorm(c.head_dim, c.norm_epsilon, dtype=dtype)
            self.k_norm = RMSNorm(c.head_dim, c.norm_epsilon, dtype=dtype)
        self.o_proj = linear(c.heads * c.head_dim, c.width, c.o_bias)
        self.mlp_norm = RMSNorm(c.width, c.norm_epsilon, dtype=dtype)
        self.gate_proj = linear(c.width, c.ffn, c.mlp_bias)
        self.up_proj = linear(c.width, c.ffn, c.mlp_bias)
        self.down_proj = linear(c.ffn, c.width, c.mlp_bias)

    def __call__(
        self,
        x_BTD: Float[Array, "B T D"],
        rotation: tuple[Float[Array, "B T H2"], Float[Array, "B T H2"]],
        segment_ids_BT: Int[Array, "B T"] | None,
        window: Int[Array, ""] | None = None,
        cache: Cache | None = None,
    ) -> tuple[Float[Array, "B T D"], Cache | None]:
        normed_BTD = self.attention_norm(x_BTD)
        y_BTD, cache = self.attend(normed_BTD, rotation, segment_ids_BT, window, cache)
        x_BTD = checkpoint_name(x_BTD + y_BTD, "dots")
        x_BTD = x_BTD + self.feed_forward(self.mlp_norm(x_BTD))
        return constrain(x_BTD, ("batch", "position", None), self.mesh), cache

    def attend(self, x_BTD, rotation, segment_ids_BT, window, cache):
        heads = (*x_BTD.shape[:2], -1, self.config.head_dim)
        qkv = apply_all((self.q_proj, self.k_proj, self.v_proj), x_BTD)
        q_BTNH, k_BTKH, v_BTKH = (x.reshape(heads) for x in qkv)
        if self.config.qk_norm:
            q_BTNH, k_BTKH = self.q_norm(q_BTNH), self.k_norm(k_BTKH)
        q_BTNH, k_BTKH = rope.rotate(q_BTNH, *rotation), rope.rotate(k_BTKH, *rotation)
        q_BTNH, k_BTKH, v_BTKH = checkpoint_name((q_BTNH, k_BTKH, v_BTKH), "dots")
        if cache is None:
            y_BTNH = attention(q_BTNH, k_BTKH, v_BTKH, segment_ids_BT, window, mesh=self.mesh)
        else:
            y_BTNH, cache = cache.attend(q_BTNH, k_BTKH, v_BTKH, segment_ids_BT, window)
        return self.o_proj(y_BTNH.reshape(*x_BTD.shape[:2], -1)), cache

    def feed_forward(self, x_BTD):
        gate_BTF, up_BTF = checkpoint_name(apply_all((self.gate_proj, self.up_proj), x_BTD), "dots")
        return self.down_proj(ops.swiglu(gate_BTF, up_BTF))


class Decoder(nnx.Module):
    """A causal language model: `model(tokens, *, positions=None, segment_ids=None) -> logits`.

    Attributes:
      layers: a stack, or (`models/cache.py`) several to be run one after the other.
      dtype: of the activations, and of the weights that are not trained.
      source: where the weights came from, for the exporters.
    """

    def __init__(
        self,
        config: ModelConfig,
        *,
        rngs: nnx.Rngs,
        dtype: Any = jnp.float32,
        mesh: Mesh | None = None,
        remat: Remat = "nothing",
        source: Source | None = None,
    ) -> None:
        @nnx.split_rngs(splits=config.layers)
        @nnx.vmap(in_axes=(0,), out_axes=0)
        def stacked_layers(rngs: nnx.Rngs) -> Layer:
            return Layer(config, dtype=dtype, mesh=mesh, rngs=rngs)

        self.config, self.mesh, self.remat, self.source = config, mesh, remat, source
        self.dtype = jnp.dtype(dtype)
        self.embed = nnx.Embed(
            config.vocab_size, config.width, dtype=dtype, param_dtype=dtype, rngs=rngs
        )
        self.layers: Layer | nnx.List = stacked_layers(rngs)
        self.final_norm = RMSNorm(config.width, config.norm_epsilon, dtype=dtype)
        if not config.tie_embeddings:
            self.lm_head = Head(config.width, config.vocab_size, dtype=dtype, rngs=rngs)

    def __call__(
        self,
        tokens: Int[Array, "B T"],
        *,
        positions: Int[Array, "B T"] | None = None,
        segment_ids: Int[Array, "B T"] | None = None,
    ) -> Float[Array, "B T V"]:
        """Logits of every next token.

        Args:
          positions: rotary positions; by default they restart at 0 with every segment.
          segment_ids: documents that must not see each other; 0 is padding.
        """
        return self.logits(self.hidden(tokens, positions=positions, segment_ids=segment_ids))

    def hidden(
        self,
        tokens: Int[Array, "B T"],
        *,
        positions: Int[Array, "B T"] | None = None,
        segment_ids: Int[Array, "B T"] | None = None,
    ) -> Float[Array, "B T D"]:
        """What the head projects to logits: the last layer's output, normed."""
        if positions is None:
            segments = jnp.ones_like(tokens) if segment_ids is None else segment_ids
            positions = ops.positions_in_segments(segments)
        return self._run(tokens, positions, segment_ids, [None] * len(self.stacks), self.remat)[0]

    def extend(
        self,
        caches: Sequence[Cache],
        tokens_BT: Int[Array, "B T"],
        segment_ids_BT: Int[Array, "B T"],
    ) -> tuple[Float[Array, "B T D"], list[Cache]]:
        """`hidden` of the tokens that come next in every row, and the caches with them.

        T is 1, or the caches are empty.

        Args:
          caches: one a stack of layers, from `empty_caches`.
          segment_ids_BT: 1, or 0 for padding, which comes before all tokens of a row.
        """
        before_B1 = jnp.sum(caches[0].segment_ids_BS, axis=1, keepdims=True)
        positions_BT = before_B1 + jnp.cumsum(segment_ids_BT, axis=1) - 1
        positions_BT = jnp.maximum(positions_BT, 0)
        opened = [cache.opened(segment_ids_BT) for cache in caches]
        x_BTD, kept = self._run(tokens_BT, positions_BT, segment_ids_BT, opened, "everything")
        return x_BTD, [cache.closed(tokens_BT.shape[1]) for cache in kept]

    def empty_caches(self, rows: int, slots: int) -> list[Cache]:
        """Caches for rows of as many tokens, padding included."""
        c = self.config
        layers = c.layers // len(self.stacks)
        shape = (layers, rows, c.kv_heads, slots, c.head_dim)
        return [Cache.empty(*shape, dtype=self.dtype, mesh=self.mesh) for _ in self.stacks]

    @property
    def stacks(self) -> Sequence[Layer]:
        return list(self.layers) if isinstance(self.layers, nnx.List) else [self.layers]

    def _run(self, tokens, positions, segment_ids, caches, remat):
        rotation = rope.rotation_tables(self.config.rope, self.config.head_dim, positions)
        x_BTD = embed(self.embed.embedding[...].astype(self.dtype), tokens, self.mesh)
        x_BTD = constrain(x_BTD, ("batch", "position", None), self.mesh)
        stacks, windows_L = self.stacks, self.config.windows_L
        parts = [None] * len(stacks) if windows_L is None else jnp.split(windows_L, len(stacks))
        kept = []
        for stack, windows, cache in zip(stacks, parts, caches, strict=True):
            x_BTD, cache = run_layers(
                stack, x_BTD, rotation, segment_ids, windows, cache, remat=remat
            )
            kept.append(cache)
        return self.final_norm(x_BTD), kept

    def logits(self, x_BTD: Float[Array, "B T D"]) -> Float[Array, "B T V"]:
        """Project hidden states to the vocabulary."""
        if self.config.tie_embeddings:
            logits_BTV = x_BTD @ self.embed.embedding[...].T.astype(x_BTD.dtype)
        else:
            logits_BTV = self.lm_head(x_BTD)
        return constrain(logits_BTV, ("batch", "position", "vocab"), self.mesh)

    def projection(self, rows: int, length: int) -> Callable[[Array], Array]:
        """`logits` for a loss over x [rows, length, D] that takes a few positions at a time.

        On a mesh either the rows or the head have to be gathered along the axes that split both:
        the rows, block by block, if they are fewer than the vocabulary, and else the head, once.
        """
        tied = self.config.tie_embeddings
        # A head that is more than its kernel, one with an adapter say, has to be called.
        if self.mesh is None or not (tied or type(self.lm_head) is Head):
            return self.logits
        kernel_DV = self.embed.embedding[...].T if tied else self.lm_head.kernel[...]
        kernel_DV = kernel_DV.astype(self.dtype)
        gathered = 2 * rows * length // axis_size(self.mesh, ("replica", "data", "context"))
        few = gathered <= self.config.vocab_size  # they come, and their gradients go back
        if few and divides(self.mesh, "split_vocab", self.config.vocab_size):
            batch, vocab = "rows", "split_vocab"
        else:
            batch, vocab = "batch", "vocab"
        kernel_DV = constrain(kernel_DV, (None, vocab), self.mesh)

        def project(x_BTD: Float[Array, "B T D"]) -> Float[Array, "B T V"]:
            x_BTD = constrain(x_BTD, (batch, "position", None), self.mesh)
            return constrain(x_BTD @ kernel_DV, (batch, "position", vocab), self.mesh)

        return project


def run_layers(
    layers: Layer,
    x_BTD: Float[Array, "B T D"],
    rotation: tuple[Float[Array, "B T H2"], Float[Array, "B T H2"]],
    segment_ids_BT: Int[Array, "B T"] | None,
    windows_L: Int[Array, "L"] | None,
    cache: Cache | None = None,
    *,
    remat: Remat = "everything",
) -> tuple[Float[Array, "B T D"], Cache | None]:
    """Run a stack of layers, one after the other, in a scan."""
    graphdef, state = nnx.split(layers)

    def run(carried, of_layer):
        layer_state, window = of_layer
        layer = nnx.merge(graphdef, layer_state)
        x_BTD, cache = carried
        return layer(x_BTD, rotation, segment_ids_BT, window, cache), None

    if remat != "everything":
        run = jax.checkpoint(run, policy=REMAT_POLICIES[remat], prevent_cse=False)
    alone = jax.tree.leaves(state)[0].shape[0] == 1
    # A loop would be simplified away too late for a cache to be written where it is.
    return jax.lax.scan(run, (x_BTD, cache), (state, windows_L), unroll=0 if alone else 1)[0]
