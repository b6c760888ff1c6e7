"""Positions split over devices; two devices are held to the contract of kernels."""

from __future__ import annotations

import jax.numpy as jnp
import numpy as np
import pytest
from attention_inputs import inputs, of_pytorch, results
from oracles import relative

from droplora_jax.core.config import MeshConfig
from droplora_jax.core.sharding import make_mesh
from droplora_jax.nn.attention.context_parallel import attention_on_mesh, splits_positions
from droplora_jax.nn.attention.kernel import AttentionInputs


@pytest.mark.parametrize(("parts", "window"), [(4, None), (8, 11)])
def test_positions_that_are_split_attend_as_whole_rows(parts, window):
    *qkv, dy = inputs(64)
    segments = jnp.asarray(np.sort(np.random.default_rng(0).integers(0, 3, (2, 64))), jnp.int32)
    given = AttentionInputs(*qkv, segments, window)
    mesh = make_mesh(MeshConfig(fsdp=1, tensor=8 // parts, context=parts))
    assert splits_positions(mesh, 64)
    ours = results(lambda given: attention_on_mesh(given, mesh), given, dy)
    for x, y in zip(ours, of_pytorch(given, dy), strict=True):
        assert relative(x, y) < 1e-5


@pytest.mark.parametrize(
    ("context", "length", "split"), [(1, 64, False), (4, 8, False), (2, 8, True)]
)
def test_which_rows_are_split(context, length, split):
    mesh = make_mesh(MeshConfig(fsdp=1, tensor=8 // context, context=context))
    assert splits_positions(mesh, length) is split
