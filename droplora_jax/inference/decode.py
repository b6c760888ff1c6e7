"""One batch of prompts, compiled: into a cache of keys and values, and on from there.

The steps run in a loop on the devices, which nothing leaves before it ends. Letters: `B` batch,
`P` position of a prompt, `T` position, `N` new token, `E` ids that end a row.
"""

from __future__ import annotations

from dataclasses import dataclass, replace
from functools import partial
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx
from jaxtyping import Array, Bool, Int, Key

from droplora_jax.adapters.surgery import view
from droplora_jax.core import prng
from droplora_jax.inference.config import Sampling
from droplora_jax.inference.sampling import sample
from droplora_jax.models.decoder import Decoder
from droplora_jax.nn.options import StepOptions
from droplora_jax.nn.quantized_kernel import Quantized, leaves


@partial(
    jax.tree_util.register_dataclass,
    data_fields=["caches", "tokens_BN", "count", "done_B", "keys_B"],
    meta_fields=[],
)
@dataclass(frozen=True)
class Decoding:
    """A batch on its way: the new tokens, `count` of which are there. The last is not cached."""

    caches: Any
    tokens_BN: Any
    count: Any
    done_B: Any
    keys_B: Any


@partial(jax.jit, static_argnames=("graphdef", "new", "sampling", "options"))
def prefill(
    graphdef: nnx.GraphDef,
    state: nnx.State,
    tokens_BP: Int[Array, "B P"],
    segment_ids_BP: Int[Array, "B P"],
    rows_B: Int[Array, "B"],
    done_B: Bool[Array, "B"],
    ends_E: Int[Array, "E"],
    key: Key[Array, ""],
    *,
    new: int,
    sampling: Sampling,
    options: StepOptions,
) -> Decoding:
    """The prompts into a cache with room for `new` tokens, and the first of these."""
    model = nnx.merge(graphdef, state)
    rows, length = tokens_BP.shape
    decoding = Decoding(
        caches=model.empty_caches(rows, length + new),
        tokens_BN=jnp.zeros((rows, new), jnp.int32),
        count=jnp.zeros((), jnp.int32),
        done_B=done_B,
        keys_B=prng.fold_each(key, rows_B),
    )
    return _advanced(model, decoding, tokens_BP, segment_ids_BP, ends_E, sampling, options)


@partial(jax.jit, static_argnames=("graphdef", "sampling"), donate_argnames="decoding")
def decode(
    graphdef: nnx.GraphDef,
    state: nnx.State,
    decoding: Decoding,
    stopped_B: Bool[Array, "B"],
    ends_E: Int[Array, "E"],
    limit: Int[Array, ""],
    *,
    sampling: Sampling,
) -> Decoding:
    """Steps until there are `limit` tokens or all rows are done."""
    model = nnx.merge(graphdef, state)

    def step(decoding: Decoding) -> Decoding:
        last_B1 = jax.lax.dynamic_slice_in_dim(decoding.tokens_BN, decoding.count - 1, 1, axis=1)
        segment_ids_B1 = (~decoding.done_B).astype(jnp.int32)[:, None]
        return _advanced(model, decoding, last_B1, segment_ids_B1, ends_E, sampling)

    def goes_on(decoding: Decoding) -> Bool[Array, ""]:
        return (decoding.count < limit) & ~jnp.all(decoding.done_B)

    decoding = replace(decoding, done_B=decoding.done_B | stopped_B)
    return jax.lax.while_loop(goes_on, step, decoding)


def _advanced(
    model: Decoder,
    decoding: Decoding,
    tokens_BT: Int[Array, "B T"],
    segment_ids_BT: Int[Array, "B T"],
    ends_E: Int[Array, "E"],
    sampling: Sampling,
    options: StepOptions = StepOptions(),
) -> Decoding:
    """With one more token, after `tokens_BT`; a row that is done gets 0."""
    x_BTD, caches = model.extend(decoding.caches, tokens_BT, segment_ids_BT, options)
    logits_BV = model.logits(x_BTD[:, -1:])[:, 0]
    keys_B = jax.vmap(jax.random.fold_in, in_axes=(0, None))(decoding.keys_B, decoding.count)
    next_B = jnp.where(decoding.done_B, 0, sample(logits_BV, keys_B, sampling))
    tokens_BN = jax.lax.dynamic_update_slice_in_dim(
        decoding.tokens_BN, next_B[:, None], decoding.count, axis=1
    )
    return replace(
        decoding,
        caches=caches,
        tokens_BN=tokens_BN,
        count=decoding.count + 1,
        done_B=decoding.done_B | jnp.any(next_B[:, None] == ends_E, axis=1),
    )


def better_apart(model: Decoder) -> bool:
    """Whether a model decodes faster with its layers `apart`: on a CPU.

    Not if it is quantised: XLA would hoist every layer's dequantised kernel out of the loop
    and keep them all.
    """
    state = nnx.state(model)
    on_cpu = next(iter(jax.tree.leaves(state)[0].devices())).platform == "cpu"
    return on_cpu and not any(isinstance(leaf, Quantized) for leaf in leaves(state))


def apart(model: Decoder) -> Decoder:
    """A view of the model with every layer a stack by itself, over the same memory.

    A CPU would copy a layer's weights out of the stack for every token.
    """
    model = view(model)
    graphdef, layers = nnx.split(model.layers)
    stacks = [jax.tree.map(partial(_layer, i), layers) for i in range(model.config.layers)]
    model.layers = nnx.List([nnx.merge(graphdef, stack) for stack in stacks])
    return model


def _layer(i: int, x: jax.Array) -> jax.Array:
    """`x[i : i + 1]`, sharing memory with `x` where alignment allows."""
    if x.size == 0 or jnp.issubdtype(x.dtype, jax.dtypes.prng_key):
        return x[i : i + 1]
    parts = [
        jax.device_put(np.asarray(shard.data)[i : i + 1], shard.device, may_alias=True)
        for shard in x.addressable_shards
    ]
    return jax.make_array_from_single_device_arrays((1, *x.shape[1:]), x.sharding, parts)
