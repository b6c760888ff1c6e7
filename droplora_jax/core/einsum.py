"""Products with a float32 sum, and one with a gradient that is cheap for a low-rank factor."""

from __future__ import annotations

from functools import partial

import jax
import jax.numpy as jnp
from jaxtyping import Array


def einsum_f32(spec: str, x: Array, y: Array) -> Array:
    """An einsum with a float32 result, without float32 copies where the platform has such a one."""
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
    """`einsum(spec, x, factor)` in the dtype of `x`, with a gradient that is cheap for a factor.

    The sum over all rows takes the narrow operand first, since compilers transpose that one: [R]
    wide, not [I] or [O]. It is accumulated in float32.
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
    # Apart, or the compiler makes the transposition a part of the product again.
    return dx, jnp.einsum(f"{order}->{kernel}", jax.lax.optimization_barrier(gradient))


product.defvjp(_product_forward, _product_backward)
