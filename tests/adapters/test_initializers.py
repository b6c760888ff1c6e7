"""How a branch starts."""

from __future__ import annotations

from functools import partial

import jax
import numpy as np
from flax import nnx

from droplora_jax.adapters.config import FROM_KERNEL, Branch
from droplora_jax.adapters.initializers import first_factors
from droplora_jax.nn.linear_spec import linear_spec


def test_a_layer_of_a_stack_without_a_branch_starts_at_zero():
    """Its scale is 0, and the parts of its kernel are divided by the scale."""
    kernel = np.random.default_rng(0).normal(size=(2, 6, 5)).astype(np.float32)
    branches = (Branch(rank=3, alpha=6.0, scale=2.0), Branch(rank=0, alpha=6.0, scale=0.0))
    spec = linear_spec(nnx.eval_shape(lambda: nnx.Linear(6, 5, rngs=nnx.Rngs(0))))

    @jax.jit
    def starts(key, kernel):
        start = partial(first_factors, spec=spec, branches=branches, shape=kernel.shape)
        return {init: start(init, key=key, kernel=kernel) for init in sorted(FROM_KERNEL)}

    for init, factors in jax.device_get(starts(jax.random.key(0), kernel)).items():
        a, b = factors
        assert not np.any(a[1]), init
        assert not np.any(b[1]), init
        assert np.all(np.isfinite(a[0] @ b[0])), init
        assert np.any(a[0] @ b[0]), init
