"""One layer of a decoder, and a stack of them.

Letters: `B` batch, `T` position, `D` width, `N` query heads, `K` key/value heads, `H` head width,
`F` feed-forward width, `V` vocabulary, `L` layers.
"""

from __future__ import annotations

from collections.abc import Mapping
from functools import partial
from types import MappingProxyType
from typing import Any

import jax
import jax.numpy as jnp
from flax import nnx
from jax.ad_checkpoint import checkpoint_name
from jax.sharding import Mesh
from jax.typing import DTypeLike
from jaxtyping import Array, Float, Int

from droplora_jax.core.sharding import constrain
from droplora_jax.models.config import ModelConfig
from droplora_jax.models.kv_cache import Cache
from droplora_jax.nn import ops, rope
from droplora_jax.nn.attention.dispatch import attention, saves_kernel
from droplora_jax.nn.attention.kernel import AttentionInputs
from droplora_jax.nn.branches import apply_all
from droplora_jax.nn.options import Kernel, Remat, StepOptions
from droplora_jax.nn.quantized_kernel import Quantized, dot_general

_policies = jax.checkpoint_policies


def _saving(*names: str) -> Any:
    """Saves values with these names (`checkpoint_name`), and what attention kernels compute."""
    return _policies.save_from_both_policies(_policies.save_only_these_names(*names), saves_kernel)


# What `jax.checkpoint` saves of a layer, by `StepOptions.remat`; `everything` needs no checkpoint.
REMAT_POLICIES: Mapping[Remat, Any] = MappingProxyType(
    {
        "dots": _saving("dots", "attention"),
        "offload": _policies.save_and_offload_only_these_names(
            names_which_can_be_saved=[],
            names_which_can_be_offloaded=["dots", "attention"],
            offload_src="device",
            offload_dst="pinned_host",
        ),
        "attention": _saving("attention"),
        "nothing": _policies.nothing_saveable,
    }
)


class RMSNorm(nnx.Module):
    def __init__(self, width: int, epsilon: float, *, dtype: DTypeLike) -> None:
        self.scale = nnx.Param(jnp.ones((width,), dtype))
        self.epsilon = epsilon

    @jax.named_scope("norm")
    def __call__(self, x: Float[Array, "*x D"]) -> Float[Array, "*x D"]:
        return ops.rms_norm(x, self.scale[...], self.epsilon)


class Linear(nnx.Linear):
    """A linear layer in the dtype of its input, whatever the dtype of its kernel."""

    def __call__(self, x: Float[Array, "*x I"], out_sharding: Any = None) -> Float[Array, "*x O"]:
        kernel = self.kernel[...]
        if isinstance(kernel, Quantized) or kernel.dtype == x.dtype:
            last_and_first = (((x.ndim - 1,), (0,)), ((), ()))
            y = dot_general(x, kernel.astype(x.dtype), last_and_first)
        else:
            y = ops.matmul(x, kernel)
        return y if self.bias is None else ops.plus(y, self.bias[...])


class Layer(nnx.Module):
    """Attention and SwiGLU, each with a norm before it and a residual around it."""

    def __init__(
        self,
        config: ModelConfig,
        *,
        dtype: DTypeLike,
        mesh: Mesh | None,
        rngs: nnx.Rngs,
    ) -> None:
        def linear(features_in: int, features_out: int, bias: bool) -> Linear:
            return Linear(features_in, features_out, use_bias=bias, param_dtype=dtype, rngs=rngs)

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
        *,
        kernel: Kernel = "auto",
    ) -> tuple[Float[Array, "B T D"], Cache | None]:
        normed_BTD = self.attention_norm(x_BTD)
        y_BTD, cache = self.attend(normed_BTD, rotation, segment_ids_BT, window, cache, kernel)
        x_BTD = checkpoint_name(x_BTD + y_BTD, "dots")
        x_BTD = x_BTD + self.feed_forward(self.mlp_norm(x_BTD))
        return constrain(x_BTD, ("batch", "position", None), self.mesh), cache

    @jax.named_scope("attention")
    def attend(self, x_BTD, rotation, segment_ids_BT, window, cache, kernel):
        heads = (*x_BTD.shape[:2], -1, self.config.head_dim)
        qkv = apply_all((self.q_proj, self.k_proj, self.v_proj), x_BTD)
        q_BTNH, k_BTKH, v_BTKH = (x.reshape(heads) for x in qkv)
        if self.config.qk_norm:
            q_BTNH, k_BTKH = self.q_norm(q_BTNH), self.k_norm(k_BTKH)
        q_BTNH, k_BTKH = rope.rotate(q_BTNH, *rotation), rope.rotate(k_BTKH, *rotation)
        q_BTNH, k_BTKH, v_BTKH = checkpoint_name((q_BTNH, k_BTKH, v_BTKH), "dots")
        inputs = AttentionInputs(q_BTNH, k_BTKH, v_BTKH, segment_ids_BT, window)
        windows = self.config.distinct_windows
        run = partial(attention, windows=windows, mesh=self.mesh, kernel=kernel)
        if cache is None:
            y_BTNH = run(inputs)
        else:
            y_BTNH, cache = cache.attend(inputs, run)
        return self.o_proj(y_BTNH.reshape(*x_BTD.shape[:2], -1)), cache

    @jax.named_scope("feed_forward")
    def feed_forward(self, x_BTD):
        gate_BTF, up_BTF = checkpoint_name(apply_all((self.gate_proj, self.up_proj), x_BTD), "dots")
        return self.down_proj(ops.swiglu(gate_BTF, up_BTF))


@jax.named_scope("layers")
def run_layers(
    layers: Layer,
    x_BTD: Float[Array, "B T D"],
    rotation: tuple[Float[Array, "B T H2"], Float[Array, "B T H2"]],
    segment_ids_BT: Int[Array, "B T"] | None,
    windows_L: Int[Array, "L"] | None,
    cache: Cache | None = None,
    *,
    options: StepOptions = StepOptions(),
) -> tuple[Float[Array, "B T D"], Cache | None]:
    """Run a stack of layers in a scan; the first axis of the stack is the layer.

    Args:
      rotation: cosine and sine of every position's angles.
      windows_L: each layer's window; None: no layer has one.
      cache: keys and values of earlier positions, to which these positions' are added.
    """
    graphdef, state = nnx.split(layers)

    def run(carried, layer_inputs):
        layer_state, window = layer_inputs
        layer = nnx.merge(graphdef, layer_state)
        x_BTD, cache = carried
        kernel = options.attention
        return layer(x_BTD, rotation, segment_ids_BT, window, cache, kernel=kernel), None

    if options.remat != "everything":
        run = jax.checkpoint(run, policy=REMAT_POLICIES[options.remat], prevent_cse=False)
    # A loop of one step would be removed by the compiler only after it decided to copy the cache.
    alone = jax.tree.leaves(state)[0].shape[0] == 1
    return jax.lax.scan(run, (x_BTD, cache), (state, windows_L), unroll=0 if alone else 1)[0]
