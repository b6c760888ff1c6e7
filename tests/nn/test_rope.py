from __future__ import annotations

import jax.numpy as jnp
import numpy as np
import pytest
import torch
import transformers
from oracles import relative
from transformers.models.llama.modeling_llama import LlamaRotaryEmbedding, apply_rotary_pos_emb

from droplora_jax.nn import rope

LLAMA31 = {
    "factor": 8.0,
    "low_freq_factor": 1.0,
    "high_freq_factor": 4.0,
    "original_max_position_embeddings": 8192,
}
LLAMA32 = LLAMA31 | {"factor": 32.0}

YARN = {"factor": 4.0, "original_max_position_embeddings": 32_768}

CASES = [
    pytest.param("default", 10_000.0, {}, 128, id="llama2"),
    pytest.param("default", 500_000.0, {}, 128, id="llama3"),
    pytest.param("linear", 10_000.0, {"factor": 4.0}, 64, id="linear"),
    pytest.param("llama3", 500_000.0, LLAMA31, 128, id="llama3.1"),
    pytest.param("llama3", 500_000.0, LLAMA32, 64, id="llama3.2"),
    pytest.param(
        "llama3", 10_000.0, LLAMA31 | {"original_max_position_embeddings": 64}, 16, id="short"
    ),
    pytest.param("yarn", 1e6, YARN, 128, id="qwen2.5"),
    pytest.param("yarn", 1e4, YARN | {"factor": 1.0}, 32, id="yarn of 1"),
    pytest.param("yarn", 1e4, YARN | {"attention_factor": 0.7}, 16, id="yarn, attention factor"),
    pytest.param("yarn", 1e4, YARN | {"mscale": 0.7, "mscale_all_dim": 1.1}, 64, id="yarn, mscale"),
    pytest.param(
        "yarn",
        1e4,
        YARN | {"beta_fast": 16.0, "beta_slow": 2.0, "truncate": False},
        64,
        id="yarn, betas",
    ),
    pytest.param("dynamic", 10_000.0, {"factor": 3.0}, 32, id="dynamic"),
]


def both(kind: str, theta: float, parameters: dict, head_dim: int):
    config = transformers.LlamaConfig(
        hidden_size=4 * head_dim,
        num_attention_heads=4,
        head_dim=head_dim,
        max_position_embeddings=64 if kind == "dynamic" else 131_072,
        rope_parameters={"rope_type": kind, "rope_theta": theta, **parameters},
    )
    if kind == "dynamic":
        parameters = {**parameters, "max_position_embeddings": 64}
    ours = rope.RopeConfig(theta, kind, tuple(parameters.items()))
    return ours, LlamaRotaryEmbedding(config)


@pytest.mark.parametrize(("kind", "theta", "parameters", "head_dim"), CASES)
def test_frequencies_equal_transformers(kind, theta, parameters, head_dim):
    ours, theirs = both(kind, theta, parameters, head_dim)
    frequencies = rope.inverse_frequencies(ours, head_dim)
    assert frequencies.dtype == np.float32
    np.testing.assert_allclose(frequencies, theirs.inv_freq, rtol=1e-6)


@pytest.mark.parametrize(("kind", "theta", "parameters", "head_dim"), CASES)
def test_rotation_equals_transformers(kind, theta, parameters, head_dim, strict):
    ours, theirs = both(kind, theta, parameters, head_dim)
    rng = np.random.default_rng(0)
    x_BTNH = rng.normal(size=(2, 5, 3, head_dim)).astype(np.float32)
    positions = np.asarray([[0, 1, 2, 3, 4], [7, 100, 1000, 3, 0]], np.int32)  # past 64

    rotated = rope.rotate(
        jnp.asarray(x_BTNH), *rope.rotation_tables(ours, head_dim, jnp.asarray(positions))
    )
    x = torch.tensor(x_BTNH).transpose(1, 2)
    expected, _ = apply_rotary_pos_emb(x, x, *theirs(x, torch.tensor(positions)))
    # A position of 1000 costs 1000 units of rounding in the angle.
    assert relative(rotated, expected.transpose(1, 2)) < 2e-5
    assert relative(rotated[0], expected.transpose(1, 2)[0]) < 1e-6


def test_rotation_keeps_the_dtype_of_its_input(strict):
    tables = rope.rotation_tables(rope.RopeConfig(), 8, jnp.zeros((1, 4), jnp.int32))
    assert tables[0].dtype == jnp.float32
    assert rope.rotate(jnp.ones((1, 4, 2, 8), jnp.bfloat16), *tables).dtype == jnp.bfloat16


def test_every_kind_names_what_it_reads():
    for kind, scaling in rope.SCALINGS.items():
        parameters = tuple((name, 4.0 + i) for i, name in enumerate(scaling.required))
        assert rope.inverse_frequencies(rope.RopeConfig(1e4, kind, parameters), 16).shape == (8,)
        for missing in scaling.required:
            fewer = tuple(item for item in parameters if item[0] != missing)
            with pytest.raises(KeyError, match=missing):
                rope.inverse_frequencies(rope.RopeConfig(1e4, kind, fewer), 16)
