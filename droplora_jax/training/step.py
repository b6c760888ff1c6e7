"""The training and evaluation steps as pure functions: what is trained, and what is planned.

Only the adapters are differentiated and only they have optimizer state; the frozen base is an
argument that no step copies. A batch is split into `k` microbatches [k, m, T] whose gradients are
summed over their loss tokens, so it does not matter how it was split.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from typing import Any

import jax
import jax.numpy as jnp
import optax
from flax import nnx
from jax.sharding import NamedSharding, PartitionSpec
from jaxtyping import Array, Float, Int, Key

from droplora_jax.adapters.surgery import draw
from droplora_jax.data.batch import Batch
from droplora_jax.models.decoder import Decoder
from droplora_jax.nn.options import StepOptions
from droplora_jax.training.loss import projected_cross_entropy


@partial(
    jax.tree_util.register_dataclass,
    data_fields=["step", "adapters", "opt_state", "initial"],
    meta_fields=[],
)
@dataclass(frozen=True)
class TrainState:
    """All that changes from step to step, and all that a checkpoint has to hold.

    A tree of arrays, or the same tree of shardings or shapes: `step` int32 [], `adapters` an
    `nnx.State`, and `opt_state` as the optimizer made it. `initial` holds the frozen A0 and B0 of
    branches that subtract their initial value; it is set only while saving and restoring.
    """

    step: Any
    adapters: Any
    opt_state: Any
    initial: Any = None


Metrics = dict[str, Array]
Sums = tuple[Array, Array, nnx.State]  # of losses, targets and gradients
TrainStep = Callable[..., tuple[TrainState, Metrics]]


def init_state(adapters: nnx.State, tx: optax.GradientTransformation) -> TrainState:
    """The state before the first step; moments are sharded as their parameters are."""
    shardings = state_shardings(adapters, tx)

    def make(adapters: nnx.State) -> TrainState:
        return TrainState(jnp.zeros((), jnp.int32), adapters, tx.init(adapters))

    return jax.jit(make, out_shardings=shardings)(adapters)


def state_shardings(adapters: nnx.State, tx: optax.GradientTransformation) -> TrainState:
    """A `TrainState` with the sharding of every leaf in the leaf's place.

    A moment of its parameter's shape is sharded as the parameter is; one of another shape, such as
    Adafactor's sums over rows and columns, is replicated.
    """
    adapter_shardings = jax.tree.map(lambda leaf: leaf.sharding, adapters)
    first = jax.tree.leaves(adapters)[0].sharding
    mesh = first.mesh if isinstance(first, NamedSharding) else None
    replicated = NamedSharding(mesh, PartitionSpec()) if mesh is not None else first
    moment_shardings = optax.tree.map_params(
        tx,
        lambda moment, leaf: leaf.sharding if moment.shape == leaf.shape else replicated,
        jax.eval_shape(tx.init, adapters),
        adapters,
        transform_non_params=lambda _: replicated,
    )
    return TrainState(replicated, adapter_shardings, moment_shardings)


def loss_sum(
    model: Decoder, batch: Batch, *, options: StepOptions = StepOptions()
) -> tuple[Float[Array, ""], Int[Array, ""]]:
    """Summed cross-entropy of a batch [m, T] in float32, and the number of its targets."""
    with jax.numpy_dtype_promotion("strict"):
        tokens_BT, targets_BT = jnp.asarray(batch["tokens"]), jnp.asarray(batch["targets"])
        segment_ids_BT = jnp.asarray(batch["segment_ids"])
        x_BTD = model.hidden(tokens_BT, segment_ids=segment_ids_BT, options=options)
        x_BTE, project = model.projection(x_BTD)
        return projected_cross_entropy(project, x_BTE, targets_BT, mesh=model.mesh)


def loss_and_gradients(
    graphdef: nnx.GraphDef,
    adapters: nnx.State,
    mask_keys: nnx.State,
    frozen: nnx.State,
    batch: Batch,
    step_key: Key[Array, ""],
    share: Float[Array, ""] | None = None,
    *,
    options: StepOptions = StepOptions(),
) -> tuple[Float[Array, ""], nnx.State]:
    """Mean loss over the targets of k microbatches [k, m, T], and its gradient for the adapters."""

    def microbatch_loss(adapters: nnx.State, rows: Array, part: Batch) -> tuple[Array, Array]:
        documents = jnp.asarray(part["segment_ids"])
        keys = draw(mask_keys, step_key, rows=rows, documents=documents, share=share)
        return loss_sum(nnx.merge(graphdef, adapters, keys, frozen), part, options=options)

    def accumulate(sums: Sums, microbatch: tuple[Array, Batch]) -> tuple[Sums, None]:
        (loss, count), gradients = jax.value_and_grad(microbatch_loss, has_aux=True)(
            adapters, *microbatch
        )
        return jax.tree.map(jnp.add, sums, (loss, count, gradients)), None

    k, m, _ = batch["tokens"].shape
    # A row's index in the whole batch, so that its mask does not depend on the split.
    rows = jnp.arange(k * m, dtype=jnp.int32).reshape(k, m)
    zeros = (jnp.zeros(()), jnp.zeros((), jnp.int32), jax.tree.map(jnp.zeros_like, adapters))
    (loss, count, gradients), _ = jax.lax.scan(accumulate, zeros, (rows, batch))
    weight = 1.0 / jnp.maximum(count, 1).astype(jnp.float32)
    return loss * weight, jax.tree.map(lambda g: g * weight.astype(g.dtype), gradients)


def train_step(
    graphdef: nnx.GraphDef,
    tx: optax.GradientTransformation,
    state: TrainState,
    mask_keys: nnx.State,
    frozen: nnx.State,
    batch: Batch,
    mask_root: Key[Array, ""],
    *,
    share: optax.Schedule | None = None,
    options: StepOptions = StepOptions(),
) -> tuple[TrainState, Metrics]:
    """One optimizer step.

    Args:
      mask_root: the run's mask key; the step is folded into it here.
      share: a schedule: the factor on all drop rates at each step; None if it is constant.
      options: how the layers are computed.
    """
    step_key = jax.random.fold_in(mask_root, state.step)
    share_now = None if share is None else jnp.asarray(share(state.step), jnp.float32)
    loss, gradients = loss_and_gradients(
        graphdef, state.adapters, mask_keys, frozen, batch, step_key, share_now, options=options
    )
    with jax.named_scope("optimizer"):
        updates, opt_state = tx.update(gradients, state.opt_state, state.adapters)
        adapters = optax.apply_updates(state.adapters, updates)
    metrics = {
        "loss": loss,
        "grad_norm": optax.tree.norm(gradients),
        "tokens": jnp.sum(batch["segment_ids"] != 0, dtype=jnp.int32),
    }
    return TrainState(state.step + 1, adapters, opt_state), metrics


def eval_step(
    graphdef: nnx.GraphDef,
    adapters: nnx.State,
    mask_keys: nnx.State,
    frozen: nnx.State,
    batch: Batch,
    *,
    options: StepOptions = StepOptions(),
) -> tuple[Float[Array, ""], Int[Array, ""]]:
    """Summed loss and number of targets of one batch [m, T], without masks."""
    return loss_sum(nnx.merge(graphdef, adapters, mask_keys, frozen), batch, options=options)


def compile_train_step(
    graphdef: nnx.GraphDef,
    tx: optax.GradientTransformation,
    adapters: nnx.State,
    share: optax.Schedule | None = None,
    *,
    options: StepOptions = StepOptions(),
) -> TrainStep:
    """`train_step` jitted, its state donated: `(state, mask_keys, frozen, batch, mask_root)`."""
    shardings = state_shardings(adapters, tx)
    return jax.jit(
        partial(train_step, graphdef, tx, share=share, options=options),
        donate_argnums=0,
        out_shardings=(shardings, shardings.step),
    )
