"""Models and layers for tests: in float32 and on one device, if they ask for nothing else."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
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


def random_module(make: Callable[[], nnx.Module], seed: int = 0) -> nnx.Module:
    """What `make` returns with other numbers in it, for which no program is compiled."""
    rng = np.random.default_rng(seed)

    def fill(_: Any, parameter: Any) -> Any:
        value = rng.normal(0.0, 0.3, parameter.shape).astype(parameter.dtype)
        return parameter.replace(jnp.asarray(value))

    graphdef, parameters = nnx.split(nnx.eval_shape(make))
    return nnx.merge(graphdef, nnx.map_state(fill, parameters))


def linear(features_in: int, features_out: int, *, seed: int = 0, **options: Any) -> nnx.Linear:
    """A linear layer of random numbers."""
    return random_module(
        lambda: nnx.Linear(features_in, features_out, rngs=nnx.Rngs(0), **options), seed
    )
