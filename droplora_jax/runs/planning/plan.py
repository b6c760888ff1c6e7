"""Does a run fit, and how fast could it be? Its own step, compiled for devices elsewhere.

Weights are shapes only and no accelerator is needed: the compiler itself says how much memory the
program takes and what it sends between devices.
"""

from __future__ import annotations

import math
import time
from collections.abc import Iterator
from dataclasses import asdict, dataclass, replace
from typing import Any, Literal, NamedTuple

import jax
from jax.sharding import Mesh

from droplora_jax.core.errors import InputError
from droplora_jax.core.sharding import make_mesh
from droplora_jax.hf.base import Base
from droplora_jax.models.config import ModelConfig
from droplora_jax.nn.options import Remat
from droplora_jax.runs.compile import AUTO, Arguments, attention_kernel, step_options
from droplora_jax.runs.config import RunConfig
from droplora_jax.runs.memory import compiled
from droplora_jax.runs.planning.flops import matrix_flops
from droplora_jax.runs.planning.hardware import Topology
from droplora_jax.runs.planning.hlo_collectives import Collective, collectives
from droplora_jax.runs.preparation import prepared_step


@dataclass(frozen=True)
class Plan:
    """What one device of a mesh would have to hold, compute and send in one step.

    Attributes:
      settings: `mesh`, `micro_batch`, `remat`, and the kernel of `attention`.
      fits: the program is compiled and its memory is within the device's; None without a limit.
      hbm_bytes_per_chip: the most that one device holds at a time, and the program itself.
      weights, adapters, optimizer: bytes of the arguments; `temporaries`: of the rest.
      flops_per_step: of the matrix products on all devices; excludes gradients of frozen weights,
        includes recomputation.
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


def plan(config: RunConfig, base: Base, where: Topology) -> Plan:
    """Compile the step of `config`, whose base is `base`, for `where`.

    Raises:
      InputError: a mesh that these devices can't form, or a batch that it can't split.
    """
    if config.train.remat == "auto":
        return _fastest(config, base, where)
    mesh = make_mesh(config.mesh, where.devices)
    steps = config.train.steps or 10**6  # no data is read: only the shape of the step counts
    step = prepared_step(config, base, mesh, steps)
    traced = step.traced(step_options(config))
    lowered = traced.lower()
    begin = time.perf_counter()
    executable, needed = compiled(lowered, where.platform)
    seconds = time.perf_counter() - begin
    program = None if executable is None else executable.as_text() or ""
    sent = None if program is None else tuple(collectives(program, mesh))
    flops = matrix_flops(traced.jaxpr)
    measured = _Measured(_sizes(step.arguments), needed, sent, flops, seconds)
    return _described(config, base, where, mesh, measured)


class _Measured(NamedTuple):
    """What the compiler says of a step.

    Attributes:
      sizes: bytes of one device that the arguments take.
      needed: bytes of one device that the program takes.
      sent: what is sent between devices; None if the compiler refused the program as too large.
      flops: of the products, on all devices.
      seconds: that compiling took.
    """

    sizes: dict[str, int]
    needed: int
    sent: tuple[Collective, ...] | None
    flops: int
    seconds: float


def _fastest(config: RunConfig, base: Base, where: Topology) -> Plan:
    """The plan with the fastest `remat` that fits; that of the smallest if none does."""
    for remat in AUTO:
        planned = plan(replace(config, train=replace(config.train, remat=remat)), base, where)
        if planned.fits is not False:
            break
    return planned


def _sizes(arguments: Arguments) -> dict[str, int]:
    """Bytes that the arguments take of one device."""
    return {
        "weights": _bytes(arguments.frozen),
        "adapters": _bytes(arguments.state.adapters),
        "optimizer": _bytes(arguments.state.opt_state),
    }


def _bytes(tree: object) -> int:
    """Bytes of one device."""
    return sum(
        math.prod(leaf.sharding.shard_shape(leaf.shape)) * leaf.dtype.itemsize
        for leaf in jax.tree.leaves(tree)
    )


def _described(
    config: RunConfig, base: Base, where: Topology, mesh: Mesh, measured: _Measured
) -> Plan:
    sizes, needed, sent, flops, compile_seconds = measured
    compiled, sent = sent is not None, sent or ()
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
            "attention": str(attention_kernel(config, base, mesh)),
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
            _useful_flops(config, base.shape) / (least * mesh.size * kind.flops)
            if least and kind
            else None
        ),
        compile_seconds=compile_seconds,
    )


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


def _least_traffic(config: RunConfig, mesh: Mesh, sizes: dict[str, int]) -> int:
    """Bytes that a device at least reads: the gathered weights, once a pass over the layers."""
    gathered = sizes["weights"] * mesh.shape["fsdp"] * mesh.shape["context"]
    passes = 3 if config.train.remat in ("attention", "nothing") else 2
    return gathered * passes * (config.train.global_batch // config.train.rows_per_pass)


def _useful_flops(config: RunConfig, c: ModelConfig) -> int:
    """4 a weight and token, as frozen weights have no gradient, and causal attention."""
    attention = c.width * c.head_dim * (2 * c.heads + 2 * c.kv_heads)
    weights = c.layers * (attention + 3 * c.width * c.ffn) + c.width * c.vocab_size
    length = config.data.max_length
    causal = 6 * c.layers * c.heads * c.head_dim * length
    return (4 * weights + causal) * length * config.train.global_batch


def smallest_change(
    config: RunConfig, base: Base, where: Topology
) -> tuple[list[str], Plan] | None:
    """The first of `changes` whose plan fits, as overrides; None if none does."""
    for overrides, changed in changes(config, where):
        try:
            planned = plan(changed, base, where)
        except InputError:
            continue
        if planned.fits:
            return overrides, planned
    return None


def changes(config: RunConfig, where: Topology) -> Iterator[tuple[list[str], RunConfig]]:
    """Other settings that take less memory, those that cost least time first."""
    count = len(where.devices)
    remats: list[Remat | Literal["auto"]] = [config.train.remat]
    if config.train.remat not in ("auto", "nothing"):
        remats.append("nothing")
    for tensor in [config.mesh.tensor, *(t for t in (2, 4, 8) if count % t == 0)]:
        same = tensor == config.mesh.tensor
        mesh = config.mesh if same else replace(config.mesh, data=1, fsdp=-1, tensor=tensor)
        mesh_overrides = [] if same else ["mesh.data=1", "mesh.fsdp=-1", f"mesh.tensor={tensor}"]
        for remat in remats:
            rows = config.train.rows_per_pass
            while rows >= 1 and config.train.global_batch % rows == 0:
                overrides = list(mesh_overrides)
                overrides += [f"train.remat={remat}"] if remat != config.train.remat else []
                if rows != config.train.rows_per_pass:
                    overrides.append(f"train.micro_batch={rows}")
                if overrides:
                    train = replace(config.train, remat=remat, micro_batch=rows)
                    yield overrides, replace(config, mesh=mesh, train=train)
                rows = rows // 2 if rows % 2 == 0 else 0
