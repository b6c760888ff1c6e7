"""What is drawn from: transformers' own warpers on the same logits."""

from __future__ import annotations

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import torch
from transformers.generation.logits_process import (
    TemperatureLogitsWarper,
    TopKLogitsWarper,
    TopPLogitsWarper,
)

from droplora_jax.core import prng
from droplora_jax.inference.config import Filters
from droplora_jax.inference.sampling import candidates, sample

VOCAB = 300


def logits(rows: int = 16) -> np.ndarray:
    return np.random.default_rng(0).normal(0.0, 3.0, (rows, VOCAB)).astype(np.float32)


def keys(rows: int):
    return prng.fold_each(prng.root_key(0), jnp.arange(rows))


def warped(filters: Filters) -> np.ndarray:
    """The probabilities that transformers draws from."""
    scores = torch.from_numpy(logits())
    warpers = [TemperatureLogitsWarper(filters.temperature)]
    warpers += [TopKLogitsWarper(filters.top_k)] if filters.top_k else []
    warpers += [TopPLogitsWarper(filters.top_p)] if filters.top_p else []
    for warper in warpers:
        scores = warper(None, scores)
    return scores.softmax(-1).numpy()


@pytest.mark.parametrize("temperature", [0.3, 1.0, 2.5])
@pytest.mark.parametrize("top_k", [None, 1, 7, 10 * VOCAB])
@pytest.mark.parametrize("top_p", [None, 1e-6, 0.5, 0.95, 1.0])
def test_the_distribution_is_that_of_transformers(temperature, top_k, top_p):
    filters = Filters(temperature, top_k, top_p)
    scores_BC, ids_BC = candidates(jnp.asarray(logits()), filters)
    ours = np.asarray(jax.nn.softmax(scores_BC, axis=1))
    if ids_BC is not None:
        spread = np.zeros((len(ours), VOCAB), np.float32)
        np.put_along_axis(spread, np.asarray(ids_BC), ours, axis=1)
        ours = spread
    theirs = warped(filters)
    np.testing.assert_array_equal(ours > 0, theirs > 0)
    np.testing.assert_allclose(ours, theirs, rtol=1e-5, atol=0)


@pytest.mark.parametrize("filters", [Filters(1.0), Filters(0.7, 5), Filters(1.5, None, 0.6)])
def test_draws_follow_the_distribution(filters):
    """So many draws that a frequency is within 5 standard deviations of its probability."""
    count = 4000
    row = jnp.broadcast_to(jnp.asarray(logits()[:1]), (count, VOCAB))
    drawn = np.bincount(np.asarray(sample(row, keys(count), filters)), minlength=VOCAB) / count
    p = warped(filters)[0]
    assert (drawn[p == 0] == 0).all()
    assert (np.abs(drawn - p) <= 5 * np.sqrt(p * (1 - p) / count) + 1 / count).all()


def test_greedy_takes_the_most_likely():
    np.testing.assert_array_equal(
        sample(jnp.asarray(logits()), keys(16), Filters()), logits().argmax(1)
    )


@pytest.mark.parametrize("filters", [Filters(1.0), Filters(1.0, 20, 0.9)])
def test_a_row_depends_on_its_own_key_alone(filters):
    whole = sample(jnp.asarray(logits()), keys(16), filters)
    part = sample(jnp.asarray(logits()[5:7]), keys(16)[5:7], filters)
    np.testing.assert_array_equal(whole[5:7], part)
