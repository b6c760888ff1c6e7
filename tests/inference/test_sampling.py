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
from droplora_jax.inference.config import Sampling
from droplora_jax.inference.sampling import candidates, sample

VOCAB = 300


def logits(rows: int = 16) -> np.ndarray:
    return np.random.default_rng(0).normal(0.0, 3.0, (rows, VOCAB)).astype(np.float32)


def keys(rows: int):
    return prng.fold_each(prng.root_key(0), jnp.arange(rows))


def warped(sampling: Sampling) -> np.ndarray:
    """The probabilities that transformers draws from."""
    scores = torch.from_numpy(logits())
    warpers = [TemperatureLogitsWarper(sampling.temperature)]
    warpers += [TopKLogitsWarper(sampling.top_k)] if sampling.top_k else []
    warpers += [TopPLogitsWarper(sampling.top_p)] if sampling.top_p else []
    for warper in warpers:
        scores = warper(None, scores)
    return scores.softmax(-1).numpy()


@pytest.mark.parametrize("temperature", [0.3, 1.0, 2.5])
@pytest.mark.parametrize("top_k", [None, 1, 7, 10 * VOCAB])
@pytest.mark.parametrize("top_p", [None, 1e-6, 0.5, 0.95, 1.0])
def test_the_distribution_is_that_of_transformers(temperature, top_k, top_p):
    sampling = Sampling(temperature=temperature, top_k=top_k, top_p=top_p)
    scores_BC, ids_BC = candidates(jnp.asarray(logits()), sampling)
    ours = np.asarray(jax.nn.softmax(scores_BC, axis=1))
    if ids_BC is not None:
        spread = np.zeros((len(ours), VOCAB), np.float32)
        np.put_along_axis(spread, np.asarray(ids_BC), ours, axis=1)
        ours = spread
    theirs = warped(sampling)
    np.testing.assert_array_equal(ours > 0, theirs > 0)
    np.testing.assert_allclose(ours, theirs, rtol=1e-5, atol=0)


@pytest.mark.parametrize(
    "sampling",
    [
        Sampling(temperature=1.0),
        Sampling(temperature=0.7, top_k=5),
        Sampling(temperature=1.5, top_p=0.6),
    ],
)
def test_draws_follow_the_distribution(sampling):
    """So many draws that a frequency is within 5 standard deviations of its probability."""
    count = 4000
    row = jnp.broadcast_to(jnp.asarray(logits()[:1]), (count, VOCAB))
    drawn = np.bincount(np.asarray(sample(row, keys(count), sampling)), minlength=VOCAB) / count
    p = warped(sampling)[0]
    assert (drawn[p == 0] == 0).all()
    assert (np.abs(drawn - p) <= 5 * np.sqrt(p * (1 - p) / count) + 1 / count).all()


def test_greedy_takes_the_most_likely():
    np.testing.assert_array_equal(
        sample(jnp.asarray(logits()), keys(16), Sampling()), logits().argmax(1)
    )


@pytest.mark.parametrize(
    "sampling", [Sampling(temperature=1.0), Sampling(temperature=1.0, top_k=20, top_p=0.9)]
)
def test_a_row_depends_on_its_own_key_alone(sampling):
    whole = sample(jnp.asarray(logits()), keys(16), sampling)
    part = sample(jnp.asarray(logits()[5:7]), keys(16)[5:7], sampling)
    np.testing.assert_array_equal(whole[5:7], part)
