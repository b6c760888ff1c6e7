"""Frozen kernels in 8 or 4 bits a weight, and products with them.

A kernel [..., I, O] is cut into tiles of inputs with one scale for each tile and output:
`W = level(value) * scale`. Levels are whole numbers, or NF4's 16 quantiles of a normal distribution
(arXiv 2305.14314). Qwix computes values and scales; they are constants to every gradient.

Two 4-bit values are packed in a byte here, because not every platform supports arrays of 4-bit
numbers (a CPU, with jax 0.10, does not in a program that is compiled ahead of time). A byte holds
corresponding values of a tile's first and second half, so that a mesh splits bytes as it splits
tiles.

Letters: `I` / `O` a layer's input / output width, `G` tiles of inputs, `P` bytes of a tile.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass, replace
from functools import partial
from types import MappingProxyType
from typing import Any

import jax
import jax.numpy as jnp
from jax.sharding import NamedSharding
from jax.typing import DTypeLike
from jaxtyping import Array, Float, Integer, UInt

from droplora_jax.core.errors import InputError

# What Qwix calls them, and how many values share a byte.
QTYPES: Mapping[str, Any] = MappingProxyType({"int8": jnp.int8, "int4": jnp.int4, "nf4": "nf4"})
PACKED: Mapping[str, int] = MappingProxyType({"int8": 1, "int4": 2, "nf4": 2})

# Appendix E of arXiv 2305.14314.
NF4_LEVELS = (
    -1.0,
    -0.6961928009986877,
    -0.5250730514526367,
    -0.39491748809814453,
    -0.28444138169288635,
    -0.18477343022823334,
    -0.09105003625154495,
    0.0,
    0.07958029955625534,
    0.16093020141124725,
    0.24611230194568634,
    0.33791524171829224,
    0.44070982933044434,
    0.5626170039176941,
    0.7229568362236023,
    1.0,
)


@partial(
    jax.tree_util.register_dataclass,
    data_fields=["values", "scales"],
    meta_fields=["kind", "gathered"],
)
@dataclass(frozen=True)
class Quantized:
    """A kernel [..., I, O] in place of an array; its leaves may be shapes only.

    It has an array's `shape` and `sharding`; `x[i]` picks a layer of a stack, and `astype` sets the
    dtype that `dense` will return.

    Attributes:
      values: [..., I, O] int8, or [..., I / 2, O] uint8 of two values each.
      scales: [..., G, O], in the dtype that the kernel has as an array.
      kind: `int8`, `int4` or `nf4`.
      gathered: the sharding to which one layer's values and scales are gathered for a product.
    """

    values: Any
    scales: Any
    kind: str
    gathered: NamedSharding | None = None

    @property
    def shape(self) -> tuple[int, ...]:
        *stack, rows, width_out = self.values.shape
        return (*stack, rows * PACKED[self.kind], width_out)

    @property
    def ndim(self) -> int:
        return self.values.ndim

    @property
    def size(self) -> int:
        return math.prod(self.shape)

    @property
    def dtype(self) -> Any:
        return self.scales.dtype

    @property
    def sharding(self) -> Any:
        return self.values.sharding

    @property
    def tile(self) -> int:
        """How many inputs share a scale."""
        return self.shape[-2] // self.scales.shape[-2]

    def __getitem__(self, index: Any) -> Quantized:
        return jax.tree.map(lambda x: x[index], self)

    def astype(self, dtype: DTypeLike) -> Quantized:
        return replace(self, scales=self.scales.astype(dtype))


def leaves(tree: Any) -> list[Any]:
    """The leaves of a tree, with a quantised kernel as one leaf."""
    return jax.tree.leaves(tree, is_leaf=lambda x: isinstance(x, Quantized))


def shapes(kernel: jax.ShapeDtypeStruct, kind: str, tile: int) -> Quantized:
    """The quantised kernel, as shapes, of a kernel of this shape; `tile` is even and divides I."""
    *stack, width_in, width_out = kernel.shape
    packed = PACKED[kind]
    dtype = jnp.int8 if packed == 1 else jnp.uint8
    return Quantized(
        jax.ShapeDtypeStruct((*stack, width_in // packed, width_out), dtype),
        jax.ShapeDtypeStruct((*stack, width_in // tile, width_out), kernel.dtype),
        kind,
    )


def quantize(kernel_IO: Float[Array, "I O"], kind: str, tile: int, dtype: DTypeLike) -> Quantized:
    """Quantise a kernel as Qwix does, from float32.

    Args:
      dtype: that of the scales.

    Raises:
      InputError: Qwix is not installed.
    """
    quantize_column = partial(
        qwix().quantize,
        qtype=QTYPES[kind],
        tiled_axes={0: tile},
        scale_dtype=dtype,
    )
    # Column by column: Qwix would flatten a whole NF4 kernel to one row, which no mesh could split.
    result = jax.vmap(quantize_column, in_axes=1, out_axes=1)(kernel_IO.astype(jnp.float32))
    values = result.qvalue if PACKED[kind] == 1 else _pack(result.qvalue, kind, tile)
    return Quantized(values, result.scale, kind)


def _pack(values_IO: Integer[Array, "I O"], kind: str, tile: int) -> UInt[Array, "GP O"]:
    """4-bit numbers, two in a byte."""
    unsigned = values_IO.astype(jnp.int32) + (8 if kind == "int4" else 0)
    halves = unsigned.reshape(-1, 2, tile // 2, values_IO.shape[1])  # [G, 2, P, O]
    return (halves[:, 0] | halves[:, 1] << 4).astype(jnp.uint8).reshape(-1, values_IO.shape[1])


def with_layer(
    stack: Quantized, kernel_IO: Float[Array, "I O"], layer: Integer[Array, ""]
) -> Quantized:
    """A stack [L, I, O] with the kernel of one layer, quantised as the stack is."""
    one = quantize(kernel_IO, stack.kind, stack.tile, stack.dtype)
    one = replace(one, gathered=stack.gathered)
    put = partial(jax.lax.dynamic_update_index_in_dim, index=layer, axis=0)
    return jax.tree.map(put, stack, one)


@jax.named_scope("dequantize")
def dense(kernel: Array | Quantized) -> Float[Array, "..."]:
    """A kernel as an array; a quantised one is computed in float32 and cast to its dtype."""
    if not isinstance(kernel, Quantized):
        return kernel
    *stack, tiles, width_out = kernel.scales.shape
    packed = PACKED[kernel.kind]
    by_tile = (*stack, tiles, 1, kernel.tile // packed, width_out)
    values = kernel.values.astype(jnp.int32).reshape(by_tile)
    if packed == 2:
        first_and_second = jnp.asarray([0, 4], jnp.int32)[:, None, None]
        values = values >> first_and_second & 15  # [..., G, 2, P, O]
    scales = kernel.scales.astype(jnp.float32)[..., None, None, :]
    return (_levels(values, kernel.kind) * scales).reshape(kernel.shape).astype(kernel.dtype)


def _levels(values: Integer[Array, "*x"], kind: str) -> Float[Array, "*x"]:
    if kind == "nf4":
        return _nf4_levels(values)
    return (values - 8 if kind == "int4" else values).astype(jnp.float32)


def _nf4_levels(index: Integer[Array, "*x"]) -> Float[Array, "*x"]:
    """The levels, selected bit by bit, since accelerators have no fast lookup in a table."""
    table: list[Array] = [jnp.float32(level) for level in NF4_LEVELS]
    for bit in range(4):
        is_set = (index >> bit) & 1 == 1
        table = [jnp.where(is_set, b, a) for a, b in zip(table[::2], table[1::2], strict=True)]
    return table[0]


def dot_general(
    x: Array, kernel: Array | Quantized, dimension_numbers: Any, **options: Any
) -> Array:
    """`jax.lax.dot_general`, for a quantised kernel too.

    The backward pass computes the array again from the quantised values: to save it would keep
    every layer's whole kernel in memory. On a mesh the quantised values are gathered, not the
    array.
    """
    if not isinstance(kernel, Quantized):
        return jax.lax.dot_general(x, kernel, dimension_numbers, **options)

    @jax.checkpoint
    def product(x: Array, kernel: Quantized) -> Array:
        return jax.lax.dot_general(x, dense(_gathered(kernel)), dimension_numbers, **options)

    return product(x, kernel)


def _gathered(kernel: Quantized) -> Quantized:
    if kernel.gathered is None:
        return kernel
    gather = partial(jax.lax.with_sharding_constraint, shardings=kernel.gathered)
    return jax.tree.map(gather, kernel)


def qwix() -> Any:
    """Qwix, the library that quantises.

    Raises:
      InputError: it is not installed.
    """
    try:
        import qwix
    except ImportError as error:
        raise InputError(
            "a quantised base needs Qwix: pip install 'droplora-jax[quantized]'"
        ) from error
    return qwix
