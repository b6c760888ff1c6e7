"""The singular values of an adapter's delta, from its factors alone: the delta is never computed.

With `A = Qa @ Ra` and `B.T = Qb @ Rb`, the singular values of `A @ B` are those of the small
`Ra @ Rb.T`, exactly, as Qa and Qb have orthonormal columns. All in float64, on the host.
"""

from __future__ import annotations

import numpy as np
from jaxtyping import Float


def singular_values(a: Float[np.ndarray, "I R"], b: Float[np.ndarray, "R O"]) -> np.ndarray:
    """The singular values of `A @ B`, largest first: min(I, R, O) of them; the others are 0."""
    return np.linalg.svd(_core(a, b)[1], compute_uv=False)


def truncate(
    a: Float[np.ndarray, "I R"], b: Float[np.ndarray, "R O"], rank: int
) -> tuple[np.ndarray, np.ndarray]:
    """The factors [I, rank] and [rank, O] of the matrix of that rank nearest to `A @ B`.

    Nearest in the Frobenius and the spectral norm (Eckart and Young). The singular values are
    shared equally by the two; ranks beyond those of `A @ B` are 0.
    """
    q_a, core, q_b = _core(a, b)
    u, s, vt = np.linalg.svd(core, full_matrices=False)
    kept = min(rank, len(s))
    root = np.sqrt(s[:kept])
    new_a, new_b = np.zeros((len(a), rank)), np.zeros((rank, b.shape[1]))
    new_a[:, :kept] = q_a @ (u[:, :kept] * root)
    new_b[:kept] = (root[:, None] * vt[:kept]) @ q_b.T
    return new_a, new_b


def _core(a: np.ndarray, b: np.ndarray) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    q_a, r_a = np.linalg.qr(a.astype(np.float64))
    q_b, r_b = np.linalg.qr(b.astype(np.float64).T)
    return q_a, r_a @ r_b.T, q_b


def effective_rank(values: Float[np.ndarray, "R"]) -> float:
    """exp of the entropy of the singular values as shares (Roy and Vetterli, 2007); 0 of none."""
    if not values.any():
        return 0.0
    shares = values[values > 0] / values.sum()
    return float(np.exp(-np.sum(shares * np.log(shares))))


def ranks_for(values: Float[np.ndarray, "R"], energy: float = 0.9) -> int:
    """How many of the largest singular values carry this share of the sum of their squares."""
    squares = np.square(values)
    if not squares.any():
        return 0
    return int(np.searchsorted(np.cumsum(squares) / squares.sum(), energy - 1e-12)) + 1
