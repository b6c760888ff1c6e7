"""Models that tests load: in float32 and on one device, if they ask for nothing else."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
from flax import nnx
from oracles import Folder

import droplora_jax as dl
from droplora_jax.core.config import MeshConfig
from droplora_jax.core.sharding import make_mesh


def one_device() -> jax.sharding.Mesh:
    return make_mesh(devices=jax.devices()[:1])


def load(
    folder: Folder | Path,
    mesh: MeshConfig | None = None,
    *,
    devices: int | None = None,
    dtype: Any = jnp.float32,
    **options: Any,
) -> nnx.Module:
    """The model of a folder: on a mesh of all devices, on the first `devices`, or on one."""
    path = folder.path if isinstance(folder, Folder) else folder
    count = devices or (1 if mesh is None else len(jax.devices()))
    return dl.load(path, mesh=make_mesh(mesh, jax.devices()[:count]), dtype=dtype, **options)
