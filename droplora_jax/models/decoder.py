"""One decoder for every family; the configuration says which features it has.

Layers are stacked along a leading axis `L` and run by a scan, so that compile time does not grow
with depth and the compiler gathers sharded weights one layer at a time. Letters: `B` batch, `T`
position, `D` width, `V` vocabulary, `L` layers.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import replace

import jax.numpy as jnp
from flax import nnx
from jax.sharding import Mesh
from jax.typing import DTypeLike
from jaxtyping import Array, Float, Int

from droplora_jax.core.sharding import axis_size, constrain, divides
from droplora_jax.models.config import ModelConfig, Source
from droplora_jax.models.embed_and_head import Embedding, Head, Noise, normal
from droplora_jax.models.kv_cache import Cache
from droplora_jax.models.layer import Layer, RMSNorm, run_layers
from droplora_jax.nn import ops, rope
from droplora_jax.nn.attention.dispatch import Choice, choose
from droplora_jax.nn.branches import Halves
from droplora_jax.nn.options import StepOptions


class Decoder(nnx.Module):
    """A causal language model: `model(tokens, *, positions=None, segment_ids=None) -> logits`.

    Attributes:
      layers: one stack of all layers, or (`inference/decode.py`) several, which run in order.
      dtype: the dtype of activations and of frozen weights.
      source: where the weights came from, for exports.
      noise: the noise on token vectors in training; None (the default): no noise.
    """

    def __init__(
        self,
        config: ModelConfig,
        *,
        rngs: nnx.Rngs,
        dtype: DTypeLike = jnp.float32,
        mesh: Mesh | None = None,
        source: Source | None = None,
    ) -> None:
        @nnx.split_rngs(splits=config.layers)
        @nnx.vmap(in_axes=(0,), out_axes=0)
        def stacked_layers(rngs: nnx.Rngs) -> Layer:
            return Layer(config, dtype=dtype, mesh=mesh, rngs=rngs)

        self.config, self.mesh, self.source = config, mesh, source
        self.dtype = jnp.dtype(dtype)
        vocab_size, width = config.vocab_size, config.width
        table_VD = normal(rngs, vocab_size, width, width, dtype)
        self.embed = Embedding(table_VD, dtype=dtype, mesh=mesh, tied=config.tie_embeddings)
        self.noise: Noise | None = nnx.data(None)
        self.layers: Layer | nnx.List = stacked_layers(rngs)
        self.final_norm = RMSNorm(config.width, config.norm_epsilon, dtype=dtype)
        if not config.tie_embeddings:
            self.lm_head = Head(normal(rngs, width, vocab_size, width, dtype))

    def __call__(
        self,
        tokens: Int[Array, "B T"],
        *,
        positions: Int[Array, "B T"] | None = None,
        segment_ids: Int[Array, "B T"] | None = None,
        options: StepOptions = StepOptions(),
    ) -> Float[Array, "B T V"]:
        """Logits of the next token at every position.

        Args:
          tokens: token ids.
          positions: rotary positions; by default they restart at 0 in every segment.
          segment_ids: the documents of a packed row, which do not see each other; 0 is padding.
          options: how the layers are computed.
        """
        x_BTD = self.hidden(tokens, positions=positions, segment_ids=segment_ids, options=options)
        return self.logits(x_BTD)

    def hidden(
        self,
        tokens: Int[Array, "B T"],
        *,
        positions: Int[Array, "B T"] | None = None,
        segment_ids: Int[Array, "B T"] | None = None,
        options: StepOptions = StepOptions(),
    ) -> Float[Array, "B T D"]:
        """The last layer's output after the final norm, which `logits` projects to the vocabulary.

        If `options.packed` is False, every row is one segment with nothing but padding after it:
        no token is preceded by a token of another segment, so causal attention need not compare
        segments. The values at padding are never used in either case.
        """
        if positions is None:
            segments = jnp.ones_like(tokens) if segment_ids is None else segment_ids
            positions = ops.positions_in_segments(segments)
        x_BTD = self._embedded(tokens, segment_ids)
        alone = [None] * len(self.stacks)
        # Other kernels are slower with segment ids; `blockwise` skips padding by them.
        compares = options.packed or self.attention_kernel(options).kernel == "blockwise"
        of_attention = segment_ids if compares else None
        return self._run(x_BTD, positions, of_attention, alone, options)[0]

    def extend(
        self,
        caches: Sequence[Cache],
        tokens_BT: Int[Array, "B T"],
        segment_ids_BT: Int[Array, "B T"],
        options: StepOptions = StepOptions(),
    ) -> tuple[Float[Array, "B T D"], list[Cache]]:
        """`hidden` of the next tokens of every row, and the caches with these tokens added.

        T is 1, or the caches are empty.

        Args:
          caches: one for each stack of layers, from `empty_caches`.
          segment_ids_BT: 1, or 0 for padding, which comes before all tokens of a row.
          options: only `options.attention` is used, since nothing is differentiated.
        """
        options = replace(options, remat="everything")
        before_B1 = jnp.sum(caches[0].segment_ids_BS, axis=1, keepdims=True)
        positions_BT = before_B1 + jnp.cumsum(segment_ids_BT, axis=1) - 1
        positions_BT = jnp.maximum(positions_BT, 0)
        opened = [cache.opened(segment_ids_BT) for cache in caches]
        x_BTD = self._embedded(tokens_BT, segment_ids_BT)
        x_BTD, kept = self._run(x_BTD, positions_BT, segment_ids_BT, opened, options)
        return x_BTD, [cache.closed(tokens_BT.shape[1]) for cache in kept if cache is not None]

    def empty_caches(self, rows: int, slots: int) -> list[Cache]:
        """Caches for `rows` rows of up to `slots` tokens, padding included."""
        c = self.config
        layers = c.layers // len(self.stacks)
        shape = (layers, rows, c.kv_heads, slots, c.head_dim)
        return [Cache.empty(*shape, dtype=self.dtype, mesh=self.mesh) for _ in self.stacks]

    def attention_kernel(self, options: StepOptions = StepOptions()) -> Choice:
        """The attention kernel that a call with these options runs, and why."""
        head_dim = self.config.head_dim
        return choose(options.attention, mesh=self.mesh, dtype=self.dtype, head_dim=head_dim)

    @property
    def stacks(self) -> Sequence[Layer]:
        return list(self.layers) if isinstance(self.layers, nnx.List) else [self.layers]

    def _embedded(
        self, tokens: Int[Array, "B T"], segment_ids: Int[Array, "B T"] | None
    ) -> Float[Array, "B T D"]:
        x_BTD = self.embed(tokens)
        if self.noise is not None:
            segments = jnp.ones_like(tokens) if segment_ids is None else segment_ids
            x_BTD = self.noise(x_BTD, segments)
        return constrain(x_BTD, ("batch", "position", None), self.mesh)

    def _run(
        self,
        x_BTD: Float[Array, "B T D"],
        positions: Int[Array, "B T"],
        segment_ids: Int[Array, "B T"] | None,
        caches: Sequence[Cache | None],
        options: StepOptions,
    ) -> tuple[Float[Array, "B T D"], list[Cache | None]]:
        rotation = rope.rotation_tables(self.config.rope, self.config.head_dim, positions)
        stacks, windows_L = self.stacks, self.config.windows_L
        parts = [None] * len(stacks) if windows_L is None else jnp.split(windows_L, len(stacks))
        kept = []
        for stack, windows, cache in zip(stacks, parts, caches, strict=True):
            x_BTD, cache = run_layers(
                stack, x_BTD, rotation, segment_ids, windows, cache, options=options
            )
            kept.append(cache)
        return self.final_norm(x_BTD), kept

    @property
    def head(self) -> Callable[[Array], Array]:
        """The output projection: a layer of its own, or the transposed embedding."""
        return self.embed.transposed() if self.config.tie_embeddings else self.lm_head

    def logits(self, x_BTD: Float[Array, "B T D"]) -> Float[Array, "B T V"]:
        """Project hidden states to the vocabulary."""
        return constrain(self.head(x_BTD), ("batch", "position", "vocab"), self.mesh)

    def projection(
        self, x_BTD: Float[Array, "B T D"]
    ) -> tuple[Float[Array, "B T E"], Callable[[Array], Array]]:
        """`logits` of x in two halves, for a loss that handles a few positions at a time.

        Returns:
          features: x, with the head adapter's masked activations appended, because masks depend on
            the position.
          project: a function from any subset of positions of `features` to their logits.
        """
        head = self.head
        if not isinstance(head, Halves):
            return x_BTD, self._by_base(head, *x_BTD.shape[:2])
        project = self._by_base(head.base, *x_BTD.shape[:2])
        hidden, end = head.halves(x_BTD.dtype)
        x_BTE = jnp.concatenate([x_BTD, hidden(x_BTD)], axis=-1)

        def project_both(x_BTE: Float[Array, "B T E"]) -> Float[Array, "B T V"]:
            x_BTD, h_BTR = jnp.split(x_BTE, [self.config.width], axis=-1)
            return end(project(x_BTD), h_BTR)

        return x_BTE, project_both

    def _by_base(
        self, head: Callable[[Array], Array], rows: int, length: int
    ) -> Callable[[Array], Array]:
        """A function from some positions of [rows, length, D] to a plain head's logits.

        Rows and head are split over the same mesh axes, so one of them has to be gathered: the
        rows, block by block, if they are fewer than the vocabulary; otherwise the head, once.
        """
        # Only a plain Head is a product with its kernel; others are called.
        if self.mesh is None or type(head) is not Head:
            return lambda x: constrain(head(x), ("batch", "position", "vocab"), self.mesh)
        gathered = 2 * rows * length // axis_size(self.mesh, ("replica", "data", "context"))
        gather_rows = gathered <= self.config.vocab_size  # rows, and gradients on their way back
        if gather_rows and divides(self.mesh, "split_vocab", self.config.vocab_size):
            batch, vocab = "rows", "split_vocab"
        else:
            batch, vocab = "batch", "vocab"
        kernel_DV = constrain(head.kernel[...], (None, vocab), self.mesh)

        def project(x_BTD: Float[Array, "B T D"]) -> Float[Array, "B T V"]:
            x_BTD = constrain(x_BTD, (batch, "position", None), self.mesh)
            return constrain(ops.matmul(x_BTD, kernel_DV), (batch, "position", vocab), self.mesh)

        return project


def with_noise(model: Decoder, alpha: float) -> Decoder:
    """A view of a model with `Noise` on token vectors in training; no noise if `alpha` is 0."""
    model = nnx.merge(*nnx.split(model))
    model.noise = Noise(alpha) if alpha else None
    return model
