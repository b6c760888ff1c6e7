"""The mesh, the rules from logical axes to mesh axes, and the shardings that follow.

Arrays are annotated with logical axes ("width", "heads"), which say what a dimension means. The
rules below map each logical axis to the mesh axes that split it. So a layer does not know the mesh,
and one rule changes the layout of all arrays.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import fields
from types import MappingProxyType
from typing import Any

import jax
import numpy as np
from jax.experimental import mesh_utils
from jax.sharding import AxisType, Mesh, NamedSharding, PartitionSpec
from jaxtyping import PyTree

from droplora_jax.core.config import MeshConfig
from droplora_jax.core.errors import InputError

# `None` means replicated; an axis that is not listed is an error. No weight is split along
# `replica`: only gradients of adapters are sent across it, so it may be a slow network.
RULES: MappingProxyType[str, tuple[str, ...] | None] = MappingProxyType(
    {
        "batch": ("replica", "data", "fsdp"),
        "position": ("context",),
        "layers": None,
        "width": ("fsdp", "context"),
        "heads": ("tensor",),
        "ffn": ("tensor",),
        "vocab": ("tensor",),
        "norm": None,
        # For the loss: its batch is not split along `fsdp`, but its vocabulary is.
        "rows": ("replica", "data"),
        "split_vocab": ("tensor", "fsdp"),
    }
)


def make_mesh(
    config: MeshConfig | None = None, devices: Sequence[jax.Device] | None = None
) -> Mesh:
    """A mesh of `MeshConfig`'s axes over `devices` (default: all), partitioned by the compiler.

    Where the devices are in several slices, `replica` goes across the slices.

    Raises:
      InputError: the sizes do not multiply to the number of devices, or do not fit the slices.

    >>> mesh = make_mesh(devices=jax.devices()[:1])
    >>> dict(mesh.shape)
    {'replica': 1, 'data': 1, 'fsdp': 1, 'tensor': 1, 'context': 1}
    """
    config = config or MeshConfig()
    devices = list(jax.devices() if devices is None else devices)
    sizes = list(config.sizes)
    if -1 in sizes:
        known = math.prod(size for size in sizes if size != -1)
        sizes[sizes.index(-1)] = len(devices) // known
    names = tuple(field.name for field in fields(config))
    if math.prod(sizes) != len(devices):
        shape = described(dict(zip(names, config.sizes, strict=True)))
        raise InputError(
            f"mesh {shape} does not match the {len(devices)} device(s) here: the sizes must "
            f"multiply to {len(devices)}; set one of them to -1 to take what is left"
        )
    return Mesh(_ordered(sizes, devices), names, axis_types=(AxisType.Auto,) * len(names))


def _ordered(sizes: Sequence[int], devices: Sequence[Any]) -> np.ndarray:
    """The devices by mesh position, so that neighbours along the last axes are close."""
    replicas, *within = sizes
    slices = len({getattr(device, "slice_index", 0) for device in devices})
    if slices > 1 and replicas % slices == 0:
        return mesh_utils.create_hybrid_device_mesh(
            (replicas // slices, *within),
            (slices, *[1] * len(within)),
            devices,
            allow_split_physical_axes=True,
        )
    if slices > 1 and devices[0].platform == "tpu":
        raise InputError(
            f"mesh.replica={replicas}: the {len(devices)} devices are in {slices} slices, and only "
            f"replicas may lie across slices; set mesh.replica to a multiple of {slices}"
        )
    return mesh_utils.create_device_mesh(sizes, devices, allow_split_physical_axes=True)


def partition_spec(
    axes: Sequence[str | None], mesh: Mesh, shape: Sequence[int] | None = None
) -> PartitionSpec:
    """The PartitionSpec of an array with these logical axes.

    With `shape`, a dimension that its mesh axes do not divide is replicated.

    Raises:
      InputError: an unknown logical axis, or two that share a mesh axis.
    """
    entries: list[tuple[str, ...] | None] = []
    for i, axis in enumerate(axes):
        if axis is not None and axis not in RULES:
            raise InputError(f"logical axis {axis!r} has no rule; known: {', '.join(RULES)}")
        mesh_axes = RULES[axis] if axis is not None else None
        if mesh_axes and shape is not None and shape[i] % axis_size(mesh, mesh_axes):
            mesh_axes = None
        entries.append(mesh_axes)
    used = [name for entry in entries if entry for name in entry]
    if len(used) != len(set(used)):
        raise InputError(f"logical axes {tuple(axes)} map to one mesh axis twice: {entries}")
    return PartitionSpec(*entries)


def axis_size(mesh: Mesh, names: Sequence[str]) -> int:
    """The number of devices along `names` together."""
    return math.prod(mesh.shape[name] for name in names)


def described(shape: Mapping[str, int]) -> str:
    """A mesh's shape in words, without axes of size 1."""
    return " x ".join(f"{name}={size}" for name, size in shape.items() if size != 1) or "1 device"


def divides(mesh: Mesh | None, axis: str, size: int) -> bool:
    """Whether the mesh axes of a logical axis split a dimension of this size evenly."""
    return mesh is not None and size % axis_size(mesh, RULES[axis] or ()) == 0


def named_sharding(
    mesh: Mesh, axes: Sequence[str | None] = (), shape: Sequence[int] | None = None
) -> NamedSharding:
    """The sharding of an array with these logical axes; replicated without any."""
    return NamedSharding(mesh, partition_spec(axes, mesh, shape))


def constrain(x: jax.Array, axes: Sequence[str | None], mesh: Mesh | None) -> jax.Array:
    """Constrains the sharding of `x`; without a mesh it is returned as it is."""
    if mesh is None or mesh.size == 1:
        return x
    return jax.lax.with_sharding_constraint(x, named_sharding(mesh, axes, x.shape))


def put(tree: PyTree, axes: Sequence[str | None], mesh: Mesh | None) -> PyTree:
    """Global arrays from host arrays that are the same on every process.

    Args:
      tree: host arrays.
      axes: the logical axes of the leading dimensions of each array.
      mesh: without one the arrays are returned as they are.
    """
    if mesh is None:
        return tree

    def place(x: np.ndarray) -> jax.Array:
        sharding = named_sharding(mesh, [*axes, *[None] * (x.ndim - len(axes))])
        return jax.make_array_from_callback(x.shape, sharding, lambda index: x[index])

    return jax.tree.map(place, tree)
