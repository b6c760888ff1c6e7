"""Einsums accumulated in float32, and one whose gradient is cheap for a low-rank factor."""

from __future__ import annotations

from functools import partial

import jax
import jax.numpy as jnp
from jaxtyping import Array


def einsum_f32(spec: str, x: Array, y: Array) -> Array:
    """An einsum with a float32 result; only CPUs need float32 copies of the operands for it."""
    if x.dtype == jnp.float32:
        return jnp.einsum(spec, x, y)
    return jax.lax.platform_dependent(
        x,
        y,
        cpu=lambda x, y: jnp.einsum(spec, x.astype(jnp.float32), y.astype(jnp.float32)),
        default=lambda x, y: jnp.einsum(spec, x, y, preferred_element_type=jnp.float32),
    )


@partial(jax.custom_vjp, nondiff_argnums=(0,))
def product(spec: str, x: Array, factor: Array) -> Array:
    """`einsum(spec, x, factor)` in the dtype of `x`, with a cheap gradient for a low-rank factor.

    The factor's gradient is a sum over all positions, accumulated in float32. Its first operand is
    the narrower one ([R] wide, not [I] or [O]), because compilers transpose the first operand.
    """
    return jnp.einsum(spec, x, factor.astype(x.dtype))


def _product_forward(spec: str, x: Array, factor: Array) -> tuple[Array, tuple[Array, Array]]:
    return product(spec, x, factor), (x, factor)


def _product_backward(spec: str, saved: tuple[Array, Array], dy: Array) -> tuple[Array, Array]:
    x, factor = saved
    operands, outputs = spec.split("->")
    inputs, kernel = operands.split(",")
    dx = jnp.einsum(f"{outputs},{kernel}->{inputs}", dy, factor.astype(dy.dtype))
    sides = [(inputs, x), (outputs, dy)]
    (narrow, first), (wide, second) = sorted(sides, key=lambda side: side[1].size)
    order = "".join(dict.fromkeys(c for c in narrow + wide if c in kernel))
    gradient = einsum_f32(f"{narrow},{wide}->{order}", first, second).astype(factor.dtype)
    # The barrier keeps the compiler from merging the transposition into the product again.
    return dx, jnp.einsum(f"{order}->{kernel}", jax.lax.optimization_barrier(gradient))


product.defvjp(_product_forward, _product_backward)
