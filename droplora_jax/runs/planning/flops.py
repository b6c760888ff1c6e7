"""Floating-point operations of a traced function, counted from its jaxpr: loops every time."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable
from statistics import mean

from jax.extend.core import ClosedJaxpr, Jaxpr, JaxprEqn

from droplora_jax.nn.attention import cudnn, splash, tokamax

# Kernels that are opaque in the jaxpr: how many [T, T, H] products each performs, counted causally.
_PRODUCTS = {
    cudnn.FORWARD: 2,
    cudnn.BACKWARD: 5,
    tokamax.FORWARD: 2,
    tokamax.BACKWARD: 7,  # two passes
}


def matrix_flops(
    jaxpr: Jaxpr | ClosedJaxpr, of_branches: Callable[[Iterable[int]], float] = mean
) -> int:
    """Operations of all products (2 for a multiplication and an addition) in one run.

    Gradients that are never computed are not counted; products recomputed for the backward pass are
    counted again. Elementwise work is left out.

    Args:
      of_branches: the operations of a conditional, from those of its branches. The mean suits key
        spans of attention, and windows of kernels, which are each taken about as often.
    """
    jaxpr = jaxpr.jaxpr if isinstance(jaxpr, ClosedJaxpr) else jaxpr
    total = 0
    for equation in jaxpr.eqns:
        if equation.primitive.name == "dot_general":
            total += _product(equation)
        elif equation.primitive.name == "while":
            total += matrix_flops(equation.params["body_jaxpr"], of_branches)
        elif equation.primitive.name == "cond":
            branches = equation.params["branches"]
            total += round(of_branches([matrix_flops(b, of_branches) for b in branches]))
        elif (products := _PRODUCTS.get(_name(equation))) is not None:
            total += products * _causal_product(equation)
        elif equation.primitive.name == "pallas_call":
            # The branch without products is taken for a block that is skipped: `_visits` has none.
            total += round(_visits(equation) * matrix_flops(equation.params["jaxpr"], max))
        else:
            inside = (matrix_flops(part, of_branches) for part in _inside(equation))
            total += _times(equation) * sum(inside)
    return total


def _name(equation: JaxprEqn) -> str:
    """The name of the function that is called, or of the primitive."""
    return equation.params.get("name") or equation.primitive.name


def _causal_product(equation: JaxprEqn) -> int:
    """One product for every pair of a query, the first argument, and a key not after it."""
    batch, queries, heads, head_dim = _shape(equation.invars[0])
    return 2 * batch * heads * head_dim * (queries * (queries + 1) // 2)


def _visits(equation: JaxprEqn) -> float:
    """How often the body of a kernel is run; a splash kernel skips some blocks of its grid."""
    name, grid = equation.params["name"] or "", equation.params["grid_mapping"].grid
    return math.prod(grid) * (splash.visited(name, grid) if name.startswith("splash") else 1.0)


def _times(equation: JaxprEqn) -> int:
    """How often the jaxprs in an equation are run, on all devices together."""
    if equation.primitive.name == "scan":
        return equation.params["length"]
    if equation.primitive.name == "shard_map":
        sizes = equation.params["mesh"].shape
        return math.prod(sizes[axis] for axis in equation.params["newly_manual_axes"])
    return 1


def _inside(equation: JaxprEqn) -> list[Jaxpr | ClosedJaxpr]:
    """The jaxprs in an equation's parameters."""
    values = equation.params.values()
    items = (i for v in values for i in (v if isinstance(v, tuple | list) else [v]))
    return [item for item in items if isinstance(item, Jaxpr | ClosedJaxpr)]


def _shape(value: object) -> tuple[int, ...]:
    return value.aval.shape  # type: ignore[attr-defined]


def _product(equation: JaxprEqn) -> int:
    (contracted, _), _ = equation.params["dimension_numbers"]
    left = _shape(equation.invars[0])
    return 2 * math.prod(_shape(equation.outvars[0])) * math.prod(left[i] for i in contracted)
