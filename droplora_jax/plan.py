"""Does it fit, and how fast could it be? The very step of a run, compiled for devices elsewhere.

Weights are shapes only and no accelerator is needed: the compiler itself says how much memory the
program takes and what it sends between devices.
"""

from __future__ import annotations

import math
import re
import time
from collections.abc import Iterator
from dataclasses import asdict, dataclass, replace
from typing import Any, cast

import jax
import jax.numpy as jnp
from jax.sharding import Mesh

from droplora_jax import hub, optim, prng, run
from droplora_jax.attention import Choice, choose
from droplora_jax.collectives import Collective, collectives
from droplora_jax.errors import InputError
from droplora_jax.flops import matrix_flops
from droplora_jax.hardware import Topology
from droplora_jax.sharding import make_mesh, named_sharding
from droplora_jax.step import TrainState, compile_train_step, state_shardings
from droplora_jax.surgery import inject, split

# The compiler's own words when a program does not fit.
_USED = re.compile(
    r"Used ([\d.]+)([KMGT]) of [\d.]+[KMGT] hbm"
    r"|required for HLO temporaries \(([\d.]+)([KMGT])\) exceeds"
)
_UNITS = {"K": 2**10, "M": 2**20, "G": 2**30, "T": 2**40}


@dataclass(frozen=True)
class Plan:
    """What one device of a mesh would have to hold, compute and send in one step.

    Attributes:
      settings: `mesh`, `micro_batch`, `remat`, and the kernel of `attention`.
      fits: the program is compiled and its memory is within the device's; None without a limit.
      hbm_bytes_per_chip: the most that one device holds at a time, and the program itself.
      weights, adapters, optimizer: bytes of the arguments; `temporaries`: of the rest.
      flops_per_step: of the products, on all devices, nothing counted for frozen weights'
        gradients, and what is computed again counted again.
      useful_flops: what is left without recomputation: MFU's numerator, 4 a parameter and token,
        and the attention.
      seconds: the least time of a step by matrix units, memory, links, and the network between
        slices.
      bound: which of them it is.
      tokens_per_second: of all devices, at most.
    """

    topology: str
    settings: dict[str, Any]
    devices: int
    fits: bool | None
    hbm_bytes_per_chip: int
    hbm_limit_bytes: int | None
    weights: int
    adapters: int
    optimizer: int
    temporaries: int
    collectives: tuple[Collective, ...]
    flops_per_step: int
    arithmetic_intensity: float
    tokens_per_step: int
    seconds: dict[str, float]
    bound: str | None
    tokens_per_second: float | None
    mfu_at_most: float | None
    compile_seconds: float

    def as_json(self) -> dict[str, Any]:
        return asdict(self)


def plan(config: run.RunConfig, where: Topology) -> Plan:
    """Compile the step of `config` for `where`.

    Raises:
      InputError: a mesh that these devices can't form, or a batch that it can't split.
    """
    mesh = make_mesh(config.mesh, where.devices)
    config.train.check_mesh(mesh, config.data.max_length)
    traced, sizes = traced_step(config, mesh, where.platform)
    lowered = traced.lower()
    begin = time.perf_counter()
    try:
        compiled = lowered.compile()
    except jax.errors.JaxRuntimeError as error:
        used = _used(str(error))
        if used is None:
            raise
        compiled, needed = None, used
    seconds = time.perf_counter() - begin
    sent: tuple[Collective, ...] = ()
    if compiled is not None:
        needed = _needed(compiled.memory_analysis(), where.platform)
        sent = tuple(collectives(compiled.as_text(), mesh))
    flops = matrix_flops(traced.jaxpr)
    return _described(
        config, where, mesh, sizes, needed, compiled is not None, sent, flops, seconds
    )


def traced_step(config: run.RunConfig, mesh: Mesh, platform: str) -> tuple[Any, dict[str, int]]:
    """The run's own step on shapes, and what its arguments take of one device."""
    folder = hub.resolve(config.model.path, config.model.revision)
    _, shape = hub.read_config(folder, config.model.ignore_config_keys)
    dtype = config.model.jax_dtype(platform)
    base = hub.abstract_model(
        shape,
        mesh=mesh,
        dtype=dtype,
        remat=config.train.remat,
        attention=config.model.attention,
    )
    graphdef, adapters, mask_keys, frozen = split(inject(base, config.adapter, key=None))
    steps = config.train.steps or 10**6  # no data is read: only the shape of the step counts
    tx = optim.optimizer(config.optim, optim.learning_rate(config.optim, steps))
    state = jax.tree.map(
        lambda leaf, sharding: jax.ShapeDtypeStruct(leaf.shape, leaf.dtype, sharding=sharding),
        jax.eval_shape(lambda a: TrainState(jnp.zeros((), jnp.int32), a, tx.init(a)), adapters),
        state_shardings(adapters, tx),
    )
    replicated = named_sharding(mesh)
    rows = config.train.rows_per_pass
    of_batch = named_sharding(mesh, (None, "batch", "position"))
    tokens = jax.ShapeDtypeStruct(
        (config.train.global_batch // rows, rows, config.data.max_length),
        jnp.int32,
        sharding=of_batch,
    )
    batch = {name: tokens for name in ("tokens", "targets", "segment_ids")}
    mask_root = prng.root_key(0)

    def elsewhere(leaf: Any) -> jax.ShapeDtypeStruct:
        return jax.ShapeDtypeStruct(leaf.shape, leaf.dtype, sharding=replicated)

    step = compile_train_step(graphdef, tx, adapters)
    arguments = (state, jax.tree.map(elsewhere, mask_keys), frozen, batch, elsewhere(mask_root))
    sizes = {
        "weights": _bytes(frozen),
        "adapters": _bytes(state.adapters),
        "optimizer": _bytes(state.opt_state),
    }
    return cast(Any, step).trace(*arguments), sizes


def _bytes(tree: Any) -> int:
    """Of one device."""
    return sum(
        math.prod(leaf.sharding.shard_shape(leaf.shape)) * leaf.dtype.itemsize
        for leaf in jax.tree.leaves(tree)
    )


def _used(message: str) -> int | None:
    """Bytes that a program would take, in the compiler's words for one that takes too many."""
    found = _USED.search(message)
    if not found:
        return None
    number, unit = (part for part in found.groups() if part is not None)
    return int(float(number) * _UNITS[unit])


def _needed(analysis: Any, platform: str) -> int:
    """Bytes of one device.

    A TPU's compiler counts temporaries that are never there together as if they were: a program
    of 20 GiB by `temp_size_in_bytes` is compiled for a chip of 16. Its peak is within 2% of what
    it lays out. That of a CPU leaves loops out.
    """
    if platform == "tpu":
        return analysis.peak_memory_in_bytes + analysis.generated_code_size_in_bytes
    return (
        analysis.argument_size_in_bytes
        + analysis.temp_size_in_bytes
        + analysis.output_size_in_bytes
        - analysis.alias_size_in_bytes
    )


def _described(
    config: run.RunConfig,
    where: Topology,
    mesh: Mesh,
    sizes: dict[str, int],
    needed: int,
    compiled: bool,
    sent: tuple[Collective, ...],
    flops: int,
    compile_seconds: float,
) -> Plan:
    kind = where.kind
    tokens = config.train.global_batch * config.data.max_length
    seconds: dict[str, float] = {}
    if kind is not None and compiled:
        seconds = {
            "matrix units": flops / mesh.size / kind.flops,
            "memory": _least_traffic(config, mesh, sizes) / kind.bandwidth,
            **_sending(sent, where),
        }
    bound = max(seconds, key=seconds.__getitem__) if seconds else None
    least = seconds[bound] if bound else None
    return Plan(
        topology=where.name,
        settings={
            "mesh": dict(mesh.shape),
            "micro_batch": config.train.rows_per_pass,
            "remat": config.train.remat,
            "attention": str(_attention(config, mesh, where.platform)),
        },
        devices=mesh.size,
        fits=None if kind is None else compiled and needed <= kind.memory,
        hbm_bytes_per_chip=needed,
        hbm_limit_bytes=kind.memory if kind else None,
        **sizes,
        temporaries=max(needed - sum(sizes.values()), 0),
        collectives=sent,
        flops_per_step=flops,
        arithmetic_intensity=flops / mesh.size / _least_traffic(config, mesh, sizes),
        tokens_per_step=tokens,
        seconds=seconds,
        bound=bound,
        tokens_per_second=tokens / least if least else None,
        mfu_at_most=(
            _useful_flops(config) / (least * mesh.size * kind.flops) if least and kind else None
        ),
        compile_seconds=compile_seconds,
    )


def _attention(config: run.RunConfig, mesh: Mesh, platform: str) -> Choice:
    folder = hub.resolve(config.model.path, config.model.revision)
    _, shape = hub.read_config(folder, config.model.ignore_config_keys)
    dtype = config.model.jax_dtype(platform)
    return choose(config.model.attention, mesh=mesh, dtype=dtype, head_dim=shape.head_dim)


def _sending(sent: tuple[Collective, ...], where: Topology) -> dict[str, float]:
    """The seconds that messages take, within a slice and between slices."""
    kind = where.kind
    assert kind is not None
    across = [one for one in sent if where.slices > 1 and "replica" in one.axes.split("+")]
    within = [one for one in sent if one not in across]
    seconds = {"links": sum(one.bytes for one in within) / (kind.link / 2)}
    if across and kind.network is not None:
        seconds["network"] = sum(one.bytes for one in across) / kind.network
    return seconds


def _least_traffic(config: run.RunConfig, mesh: Mesh, sizes: dict[str, int]) -> int:
    """Bytes that a device at least reads: the gathered weights, once a pass over the layers."""
    gathered = sizes["weights"] * mesh.shape["fsdp"] * mesh.shape["context"]
    passes = 3 if config.train.remat == "nothing" else 2
    return gathered * passes * (config.train.global_batch // config.train.rows_per_pass)


def _useful_flops(config: run.RunConfig) -> int:
    """4 a weight and token, as frozen weights have no gradient, and causal attention."""
    folder = hub.resolve(config.model.path, config.model.revision)
    _, c = hub.read_config(folder, config.model.ignore_config_keys)
    attention = c.width * c.head_dim * (2 * c.heads + 2 * c.kv_heads)
    weights = c.layers * (attention + 3 * c.width * c.ffn) + c.width * c.vocab_size
    length = config.data.max_length
    causal = 6 * c.layers * c.heads * c.head_dim * length
    return (4 * weights + causal) * length * config.train.global_batch


def smallest_change(config: run.RunConfig, where: Topology) -> tuple[list[str], Plan] | None:
    """The first of `changes` whose plan fits, as overrides; None if none does."""
    for overrides, changed in changes(config, where):
        try:
            found = plan(changed, where)
        except InputError:
            continue
        if found.fits:
            return overrides, found
    return None


def changes(config: run.RunConfig, where: Topology) -> Iterator[tuple[list[str], run.RunConfig]]:
    """Other settings that take less memory, those that cost least time first."""
    count = len(where.devices)
    remats: list[Any] = [
        config.train.remat,
        *(["nothing"] if config.train.remat != "nothing" else []),
    ]
    for tensor in [config.mesh.tensor, *(t for t in (2, 4, 8) if count % t == 0)]:
        same = tensor == config.mesh.tensor
        mesh = config.mesh if same else replace(config.mesh, data=1, fsdp=-1, tensor=tensor)
        of_mesh = [] if same else ["mesh.data=1", "mesh.fsdp=-1", f"mesh.tensor={tensor}"]
        for remat in remats:
            rows = config.train.rows_per_pass
            while rows >= 1 and config.train.global_batch % rows == 0:
                overrides = list(of_mesh)
                overrides += [f"train.remat={remat}"] if remat != config.train.remat else []
                if rows != config.train.rows_per_pass:
                    overrides.append(f"train.micro_batch={rows}")
                if overrides:
                    train = replace(config.train, remat=remat, micro_batch=rows)
                    yield overrides, replace(config, mesh=mesh, train=train)
                rows = rows // 2 if rows % 2 == 0 else 0
