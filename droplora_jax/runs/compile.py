"""A run's training step, traced and compiled from shapes alone: no weight has to be there."""

from __future__ import annotations

import time
from collections.abc import Mapping
from dataclasses import dataclass, replace
from typing import NamedTuple, cast

import jax
import jax.numpy as jnp
import optax
from flax import nnx
from jax.sharding import Mesh
from jax.stages import Traced, Wrapped

from droplora_jax.adapters.surgery import inject, split
from droplora_jax.core import prng
from droplora_jax.core.errors import InputError
from droplora_jax.core.sharding import named_sharding
from droplora_jax.hf.base import Base
from droplora_jax.models.decoder import Decoder, with_noise
from droplora_jax.nn.attention.dispatch import Choice, choose
from droplora_jax.nn.options import Remat, StepOptions
from droplora_jax.runs.config import RunConfig, quantize_keys
from droplora_jax.runs.memory import GIB, compiled
from droplora_jax.training.compiled_step import CompiledStep
from droplora_jax.training.optimizer import Optimizer
from droplora_jax.training.profiling import COMPILER_OPTIONS
from droplora_jax.training.step import TrainState, compile_train_step, state_shardings

# What `auto` tries, the fastest first. `everything` is not among them: reading what `dots`
# recomputes takes longer than recomputing it. Nor is `offload`: whether it is faster than
# recomputing depends on the link to the host, which no compiler knows.
AUTO: tuple[Remat, ...] = ("dots", "attention", "nothing")


class Arguments(NamedTuple):
    """What a step takes, as shapes and shardings."""

    state: TrainState
    mask_keys: nnx.State
    frozen: nnx.State
    batch: Mapping[str, jax.ShapeDtypeStruct]
    mask_root: jax.ShapeDtypeStruct


@dataclass(frozen=True)
class AbstractStep:
    """A run's step before it is traced: all but how its layers are computed.

    Attributes:
      optim: the optimizer and its learning rates.
      share: a schedule: the factor on all drop rates at each step; None if it is constant.
    """

    graphdef: nnx.GraphDef[Decoder]
    optim: Optimizer
    share: optax.Schedule | None
    arguments: Arguments

    @property
    def trained_modules(self) -> frozenset[str]:
        """The model's own attributes, such as `layers`, in which something is trained."""
        paths = dict(self.arguments.state.adapters.flat_state())
        return frozenset(str(path[0]) for path in paths)

    def traced(self, options: StepOptions) -> Traced:
        """The step with these options, traced for the arguments."""
        adapters = self.arguments.state.adapters
        step = compile_train_step(
            self.graphdef, self.optim.tx, adapters, self.share, options=options
        )
        return cast(Wrapped, step).trace(*self.arguments)


def step_options(config: RunConfig) -> StepOptions:
    """The options that a run names; for `train.remat=auto` those of the smallest step."""
    remat: Remat = "nothing" if config.train.remat == "auto" else config.train.remat
    return StepOptions(config.data.packed, remat, config.model.attention)


def attention_kernel(config: RunConfig, base: Base, mesh: Mesh) -> Choice:
    """The attention kernel that a run takes on these devices.

    Raises:
      InputError: the devices can't run the kernel that `model.attention` names.
    """
    dtype = config.model.dtype_on(mesh.devices.flat[0].platform)
    try:
        return choose(config.model.attention, mesh=mesh, dtype=dtype, head_dim=base.shape.head_dim)
    except InputError as error:
        raise error.within("model") from error


def abstract_step(
    config: RunConfig, base: Base, mesh: Mesh, optim: Optimizer, share: optax.Schedule | None
) -> AbstractStep:
    """The step of a run, from shapes alone.

    Raises:
      InputError: an adapter that does not fit the base, or options of the optimizer that match
        nothing that is trained.
    """
    dtype = config.model.dtype_on(mesh.devices.flat[0].platform)
    with quantize_keys("model."):
        model = base.abstract(mesh, dtype=dtype, quantization=config.model.quantization())
    model = with_noise(model, config.train.neftune_alpha)
    graphdef, adapters, mask_keys, frozen = split(inject(model, config.adapter, key=None))
    state = jax.tree.map(
        lambda leaf, sharding: jax.ShapeDtypeStruct(leaf.shape, leaf.dtype, sharding=sharding),
        jax.eval_shape(
            lambda a: TrainState(jnp.zeros((), jnp.int32), a, optim.tx.init(a)), adapters
        ),
        state_shardings(adapters, optim.tx),
    )
    replicated = named_sharding(mesh)

    def everywhere(leaf: jax.Array | jax.ShapeDtypeStruct) -> jax.ShapeDtypeStruct:
        return jax.ShapeDtypeStruct(leaf.shape, leaf.dtype, sharding=replicated)

    arguments = Arguments(
        state,
        jax.tree.map(everywhere, mask_keys),
        frozen,
        _batch(config, mesh),
        everywhere(prng.root_key(0)),
    )
    return AbstractStep(graphdef, optim, share, arguments)


def _batch(config: RunConfig, mesh: Mesh) -> Mapping[str, jax.ShapeDtypeStruct]:
    rows = config.train.rows_per_pass
    shape = (config.train.global_batch // rows, rows, config.data.max_length)
    tokens = jax.ShapeDtypeStruct(
        shape, jnp.int32, sharding=named_sharding(mesh, (None, "batch", "position"), shape)
    )
    return {name: tokens for name in ("tokens", "targets", "segment_ids")}


def compile_step(
    step: AbstractStep, config: RunConfig, platform: str, limit: int | None
) -> CompiledStep:
    """The step of a run, compiled with the `remat` that it names, or with the fastest that fits.

    Nothing runs on a device, so this can be done beside what does; of several processes each
    comes to the same.

    Args:
      limit: bytes of a device (`memory.limit`), if known.

    Raises:
      InputError: it does not fit.
    """
    begin = time.perf_counter()
    remat, options = config.train.remat, step_options(config)
    compiler_options = COMPILER_OPTIONS.get(platform, {}) if config.train.profile_steps else {}
    tried: list[str] = []
    for policy in AUTO if remat == "auto" else (remat,):
        traced = step.traced(replace(options, remat=policy))
        executable, needed = compiled(traced.lower(), platform, compiler_options)
        if executable is not None and (remat != "auto" or limit is None or needed <= limit):
            reason = _reason(policy, needed, limit, platform, tried) if remat == "auto" else None
            return CompiledStep(executable, policy, reason, time.perf_counter() - begin)
        tried.append(f"{policy} {needed / GIB:.2f} GiB")
    usable = f", and {limit / GIB:.2f} GiB are usable" if limit else ""
    raise InputError(
        f"train.remat={remat!r}: a step takes more memory than a device has ({', '.join(tried)}"
        f"{usable}); lower train.micro_batch or data.max_length, or take more devices"
        + ("" if remat in ("auto", "nothing") else "; train.remat=auto takes less if it has to")
    )


def _reason(policy: str, needed: int, limit: int | None, platform: str, tried: list[str]) -> str:
    if limit is None:
        return f"remat {policy}, the fastest: no limit of memory is known on {platform}"
    rest = f"; too large: {', '.join(tried)}" if tried else ""
    return (
        f"remat {policy}, the fastest that fits: {needed / GIB:.2f} of {limit / GIB:.2f} usable "
        f"GiB a device{rest}"
    )
