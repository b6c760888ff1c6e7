"""The quantiles of lengths in a report."""

from __future__ import annotations

from collections import Counter

import numpy as np
import pytest

from droplora_jax.data.report import quantile


@pytest.mark.parametrize("seed", range(4))
def test_quantiles_are_numpys(seed):
    random = np.random.default_rng(seed)
    values = random.integers(1, 50, 1 + 7 * seed)
    counts = sorted(Counter(values.tolist()).items())
    for part in (0.0, 0.5, 0.9, 0.99, 1.0):
        assert quantile(counts, part) == np.quantile(values, part, method="inverted_cdf")
