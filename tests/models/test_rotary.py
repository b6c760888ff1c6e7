"""Rotary settings as published models spell them, compared with what transformers reads."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import numpy as np
import pytest
import transformers
from transformers.models.llama.modeling_llama import LlamaRotaryEmbedding

from droplora_jax.core.errors import InputError
from droplora_jax.models.families import FAMILIES
from droplora_jax.nn.rope import inverse_frequencies

SHAPE = {
    "model_type": "llama",
    "vocab_size": 64,
    "hidden_size": 64,
    "intermediate_size": 64,
    "num_hidden_layers": 1,
    "num_attention_heads": 4,
    "max_position_embeddings": 256,
}
YARN = {"type": "yarn", "factor": 4.0, "original_max_position_embeddings": 64}
LLAMA3 = {"rope_type": "llama3", "factor": 8.0, "low_freq_factor": 1.0, "high_freq_factor": 4.0}
PUBLISHED: dict[str, dict[str, Any]] = {
    "a mark among the settings": {"rope_scaling": {**YARN, "finetuned": True}},
    "no original length": {"rope_scaling": {"rope_type": "yarn", "factor": 2.0}},
    "the original length beside": {"rope_scaling": LLAMA3, "original_max_position_embeddings": 32},
    "default of factor 1": {"rope_scaling": {"type": "default", "factor": 1.0}},
    "no theta": {"rope_theta": None, "rope_scaling": None},
    "linear": {
        "rope_scaling": {
            "type": "linear",
            "factor": 2.0,
            "original_max_position_embeddings": 128,
        },
        "rope_theta": 5e5,
    },
    "the same twice": {
        "rope_scaling": {**YARN, "rope_theta": 5e5},
        "rope_parameters": {**YARN, "rope_theta": 5e5},
    },
}


def shape_of(**keys: Any):
    return FAMILIES["llama"].model_config({**SHAPE, **keys})


@pytest.mark.parametrize("keys", PUBLISHED.values(), ids=list(PUBLISHED))
def test_frequencies_equal_transformers(keys):
    given = {key: value for key, value in keys.items() if value is not None}
    theirs = LlamaRotaryEmbedding(transformers.LlamaConfig(**{**SHAPE, **given}))
    ours = inverse_frequencies(shape_of(**keys).rope, 16)
    np.testing.assert_allclose(ours, theirs.inv_freq, rtol=1e-6)


@pytest.mark.parametrize(
    ("positions", "scaling", "expected"),
    [
        (64, YARN, 256),  # the recipe that leaves max_position_embeddings
        (256, YARN, 256),
        (1000, YARN, 1000),
        (64, {"type": "linear", "factor": 4.0}, 64),
    ],
)
def test_positions_with_yarn(positions, scaling, expected):
    shape = shape_of(max_position_embeddings=positions, rope_scaling=scaling)
    assert shape.max_positions == expected


def test_two_spellings_that_differ():
    """transformers drops one of them, the theta in it too."""
    both = {
        "rope_scaling": YARN,
        "rope_parameters": {"rope_type": "default", "rope_theta": 5e5},
    }
    theirs = transformers.LlamaConfig(**{**SHAPE, **both}).rope_parameters
    assert (theirs["rope_type"], theirs["rope_theta"]) == ("yarn", 10_000.0)
    with pytest.raises(InputError, match=r"rope_scaling=.*beside rope_parameters=.*drops"):
        shape_of(**both)
    with pytest.raises(InputError, match=r"rope_theta=1000.0 beside rope_parameters="):
        shape_of(rope_theta=1e3, rope_parameters=both["rope_parameters"])
    with pytest.raises(InputError, match=r"original_max_position_embeddings=32, but 64 in"):
        shape_of(rope_scaling=YARN, original_max_position_embeddings=32)


def test_a_factor_without_a_scaling():
    with pytest.raises(InputError, match="'default' with a factor other than 1"):
        shape_of(rope_scaling={"type": "default", "factor": 2.0})


def test_neutral_settings_are_no_settings():
    plain = shape_of()
    assert shape_of(rope_scaling={}, rope_parameters=None) == plain
    neutral = {"rope_type": "default", "partial_rotary_factor": 1.0}
    assert shape_of(rope_parameters=neutral) == plain
    assert shape_of(rope_theta=5e5).rope == replace(plain.rope, theta=5e5)
