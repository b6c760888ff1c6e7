"""Adapters on layers that Qwix quantised: what `examples/qwix_base.py` does."""

from __future__ import annotations

import runpy
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx
from oracles import randomized, relative

import droplora_jax as dl
from droplora_jax.adapters.surgery import adapters_of

qwix = pytest.importorskip("qwix")

EXAMPLE = Path(__file__).parents[3] / "examples" / "qwix_base.py"
KEY = dl.root_key(0)
ROWS = jnp.arange(4)


@pytest.fixture(scope="module")
def example() -> dict:
    """The variables of the example after it has run, and what it printed."""
    printed: list[str] = []
    variables = runpy.run_path(
        str(EXAMPLE), {"print": lambda *words: printed.append(" ".join(map(str, words)))}
    )
    return {**variables, "printed": printed}


@nnx.jit
def run(model, tokens):
    return model(tokens)


def test_it_trains_the_factors_beside_kernels_of_8_bits(example):
    before, after = (float(line.split()[-1]) for line in example["printed"][:2])
    assert after < 0.7 * before
    adapters = adapters_of(example["model"])
    assert set(adapters) == {f"layers.{i}.{name}" for i in range(2) for name in ("up", "down")}
    for adapter in adapters.values():
        assert adapter.base.kernel.array.qvalue[...].dtype == jnp.int8
        assert np.any(adapter.lora_b[...])
    factors = dl.interop.factors(example["model"])
    assert factors["layers.1.up.lora_A.weight"].shape == (8, 64)
    assert factors["layers.1.up.lora_B.weight"].shape == (128, 8)


@pytest.mark.parametrize(
    "options",
    [
        {},
        {"granularity": "sequence", "rescale": False},
        {"granularity": "step", "sampler": "exact"},
    ],
    ids=str,
)
def test_masks_are_those_of_the_same_adapters_on_the_dequantised_base(example, options):
    """Evaluation has none; and without drops, training is evaluation."""
    tokens = example["tokens"][:, :-1]
    plain = example["Model"](nnx.Rngs(0))
    config = dl.DropLoRA(rank=8, alpha=16, targets="(up|down)$", **options)
    provider = qwix.PtqProvider([example["rule"]])
    ours = randomized(dl.inject(plain, config, key=KEY), size=0.1)
    quantised = qwix.quantize_model(ours, provider, example["tokens"])
    adapters = adapters_of(quantised)
    for path, adapter in adapters_of(ours).items():
        kernel = adapters[path].base.kernel.array
        array = qwix.QArray(kernel.qvalue[...], kernel.scale[...])
        adapter.base.kernel = nnx.Param(qwix.dequantize(array))
    assert relative(run(quantised, tokens), run(plain, tokens)) > 1e-3
    assert relative(run(quantised, tokens), run(ours, tokens)) < 1e-5
    masked = [
        run(dl.masked(quantised, jax.random.fold_in(KEY, step), rows=ROWS), tokens)
        for step in (0, 1, 0)
    ]
    np.testing.assert_array_equal(masked[0], masked[2])
    assert relative(masked[0], masked[1]) > 1e-3
    assert relative(masked[0], run(quantised, tokens)) > 1e-3
    again = run(dl.masked(ours, jax.random.fold_in(KEY, 0), rows=ROWS), tokens)
    assert relative(masked[0], again) < 1e-5
