"""What is drawn from: transformers' own warpers on the same logits."""

from __future__ import annotations

from functools import partial

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
LOGITS = np.random.default_rng(0).normal(0.0, 3.0, (16, VOCAB)).astype(np.float32)

# Every pair of values of two options.
FILTERS = [
    Sampling(temperature=(0.3, 1.0, 2.5)[(i + j) % 3], top_k=top_k, top_p=top_p)
    for i, top_k in enumerate([None, 1, 7, 10 * VOCAB])
    for j, top_p in enumerate([None, 1e-6, 0.5, 0.95, 1.0])
]


@partial(jax.jit, static_argnames="sampling")
def probabilities(logits: jax.Array, sampling: Sampling) -> jax.Array:
    """What is drawn from, in the order of the vocabulary."""
    scores_BC, ids_BC = candidates(logits, sampling)
    p_BC = jax.nn.softmax(scores_BC, axis=1)
    if ids_BC is None:
        return p_BC
    return jnp.put_along_axis(jnp.zeros_like(logits), ids_BC, p_BC, axis=1, inplace=False)


@partial(jax.jit, static_argnames="sampling")
def draw(logits: jax.Array, rows: jax.Array, sampling: Sampling) -> jax.Array:
    return sample(logits, prng.fold_each(prng.root_key(0), rows), sampling)


def warped(sampling: Sampling) -> np.ndarray:
    """The probabilities that transformers draws from."""
    scores = torch.from_numpy(LOGITS)
    warpers = [TemperatureLogitsWarper(sampling.temperature)]
    warpers += [TopKLogitsWarper(sampling.top_k)] if sampling.top_k else []
    warpers += [TopPLogitsWarper(sampling.top_p)] if sampling.top_p else []
    for warper in warpers:
        scores = warper(None, scores)
    return scores.softmax(-1).numpy()


@pytest.mark.parametrize("sampling", FILTERS, ids=str)
def test_the_distribution_is_that_of_transformers(sampling):
    ours, theirs = np.asarray(probabilities(LOGITS, sampling)), warped(sampling)
    np.testing.assert_array_equal(ours > 0, theirs > 0)
    np.testing.assert_allclose(ours, theirs, rtol=1e-5, atol=0)


@pytest.mark.parametrize(
    "sampling",
    [
        Sampling(temperature=1.0),
        Sampling(temperature=0.7, top_k=5),
        Sampling(temperature=1.5, top_p=0.6),
    ],
    ids=str,
)
def test_draws_follow_the_distribution(sampling):
    """So many draws that a frequency is within 5 standard deviations of its probability."""
    count = 4000
    row = np.broadcast_to(LOGITS[:1], (count, VOCAB))
    drawn = np.asarray(draw(row, np.arange(count), sampling))
    drawn = np.bincount(drawn, minlength=VOCAB) / count
    p = warped(sampling)[0]
    assert (drawn[p == 0] == 0).all()
    assert (np.abs(drawn - p) <= 5 * np.sqrt(p * (1 - p) / count) + 1 / count).all()


def test_greedy_takes_the_most_likely():
    np.testing.assert_array_equal(draw(LOGITS, np.arange(16), Sampling()), LOGITS.argmax(1))


@pytest.mark.parametrize(
    "sampling", [Sampling(temperature=1.0), Sampling(temperature=1.0, top_k=20, top_p=0.9)], ids=str
)
def test_a_row_depends_on_its_own_key_alone(sampling):
    """Neither on its place, nor on the rows around it, nor on how many there are."""
    drawn = np.asarray(draw(LOGITS, np.arange(16), sampling))
    np.testing.assert_array_equal(draw(LOGITS[::-1], np.arange(16)[::-1], sampling), drawn[::-1])
    np.testing.assert_array_equal(draw(LOGITS[5:7], np.arange(5, 7), sampling), drawn[5:7])
