"""Floating-point operations of a traced function, counted from its jaxpr: loops every time."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable
from statistics import mean
from typing import Any

from droplora_jax.nn.attention import cudnn, splash, tokamax

# Of kernels whose inside says nothing: products of queries and keys, of the causal half.
_PRODUCTS = {
    cudnn.FORWARD: 2,
    cudnn.BACKWARD: 5,
    tokamax.FORWARD: 2,
    tokamax.BACKWARD: 7,  # two passes
}


def matrix_flops(jaxpr: Any, of_branches: Callable[[Iterable[int]], float] = mean) -> int:
    """Operations of all products (2 for a multiplication and an addition) in one run.

    Nothing is taken on trust about which gradients are needed: what is not in the program is not
    counted, and what is computed again for the backward pass is. Elementwise work is left out.

    Args:
      of_branches: what counts of several of which one is run. Spans of attention, and windows of
        kernels, are each taken about as often.
    """
    jaxpr = getattr(jaxpr, "jaxpr", jaxpr)
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
            # A branch without products is that of a block that is skipped, and no visit.
            total += round(_visits(equation) * matrix_flops(equation.params["jaxpr"], max))
        else:
            inside = (matrix_flops(part, of_branches) for part in _inside(equation))
            total += _times(equation) * sum(inside)
    return total


def _name(equation: Any) -> str:
    """Of the primitive, or of the function that is called."""
    return equation.params.get("name") or equation.primitive.name


def _causal_product(equation: Any) -> int:
    """One product for every pair of a query, the first argument, and a key not after it."""
    batch, queries, heads, head_dim = equation.invars[0].aval.shape
    return 2 * batch * heads * head_dim * (queries * (queries + 1) // 2)


def _visits(equation: Any) -> float:
    """How often the inside of a kernel is run; of a splash kernel, but where it skips."""
    name, grid = equation.params["name"] or "", equation.params["grid_mapping"].grid
    return math.prod(grid) * (splash.visited(name, grid) if name.startswith("splash") else 1.0)


def _times(equation: Any) -> int:
    """How often the inside of an equation is run, on all devices together."""
    if equation.primitive.name == "scan":
        return equation.params["length"]
    if equation.primitive.name == "shard_map":
        sizes = equation.params["mesh"].shape
        return math.prod(sizes[axis] for axis in equation.params["newly_manual_axes"])
    return 1


def _inside(equation: Any) -> list[Any]:
    found = []
    for value in equation.params.values():
        for item in value if isinstance(value, tuple | list) else [value]:
            if hasattr(getattr(item, "jaxpr", item), "eqns"):
                found.append(item)
    return found


def _product(equation: Any) -> int:
    (contracted, _), _ = equation.params["dimension_numbers"]
    left = equation.invars[0].aval.shape
    return 2 * math.prod(equation.outvars[0].aval.shape) * math.prod(left[i] for i in contracted)
