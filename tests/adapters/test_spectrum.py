"""The spectrum of a delta from its factors, against the delta itself."""

from __future__ import annotations

import numpy as np
import pytest

from droplora_jax.adapters.spectrum import effective_rank, ranks_for, singular_values, truncate

SHAPES = [(40, 6, 30), (30, 6, 40), (3, 6, 40), (40, 6, 3)]


def factors(i: int, r: int, o: int) -> tuple[np.ndarray, np.ndarray]:
    rng = np.random.default_rng(0)
    return rng.standard_normal((i, r)).astype(np.float32), rng.standard_normal((r, o))


@pytest.mark.parametrize("shape", SHAPES)
def test_singular_values_are_those_of_the_delta(shape):
    a, b = factors(*shape)
    expected = np.linalg.svd(a @ b, compute_uv=False)[: min(shape)]
    np.testing.assert_allclose(singular_values(a, b), expected, rtol=1e-12)


@pytest.mark.parametrize("rank", [1, 2, 5, 6, 8])
@pytest.mark.parametrize("shape", SHAPES)
def test_a_truncation_is_the_best_there_is(shape, rank):
    a, b = factors(*shape)
    new_a, new_b = truncate(a, b, rank)
    assert new_a.shape == (len(a), rank)
    assert new_b.shape == (rank, b.shape[1])
    u, s, vt = np.linalg.svd(a @ b, full_matrices=False)
    best = (u[:, :rank] * s[:rank]) @ vt[:rank]
    np.testing.assert_allclose(new_a @ new_b, best, atol=1e-12 * s[0])


def test_measures_of_a_spectrum():
    even = np.ones(4)
    assert effective_rank(even) == pytest.approx(4)
    assert effective_rank(np.array([5.0, 0, 0])) == pytest.approx(1)
    assert effective_rank(np.array([3.0, 1.0])) == pytest.approx(4 / 3**0.75)  # exp of the entropy
    assert [ranks_for(even, share) for share in (0.25, 0.26, 0.5, 0.9, 1.0)] == [1, 2, 2, 4, 4]
    assert ranks_for(np.array([3.0, 1.0])) == 1  # 9 of 10
    assert effective_rank(np.zeros(3)) == ranks_for(np.zeros(3)) == 0
