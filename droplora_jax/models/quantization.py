"""The shapes of a base whose linear layers are stored in fewer bits."""

from __future__ import annotations

from typing import TypeVar

import jax
from flax import nnx

from droplora_jax.core.errors import InputError
from droplora_jax.nn.layer_paths import check_patterns, dotted
from droplora_jax.nn.options import Quantization
from droplora_jax.nn.quantized_kernel import Quantized, shapes

Model = TypeVar("Model", bound=nnx.Module)


def quantized_shapes(model: Model, quantization: Quantization) -> Model:
    """Replace the kernels of a model of shapes by those of quantised kernels, in place.

    Raises:
      InputError: a pattern that matches nothing, or a tile that does not divide a layer's inputs.
    """
    layers = {
        dotted(path): node for path, node in nnx.iter_graph(model) if isinstance(node, nnx.Linear)
    }
    names = {(path,): [(path,)] for path in layers}
    check_patterns({"pattern": tuple(quantization.pattern)}, names)
    for path, layer in layers.items():
        kind = quantization.of(path)
        if kind != "none":
            kernel = _shapes(path, layer.kernel.get_value(), kind, quantization.tile)
            layer.kernel = nnx.Param(kernel)
    return model


def _shapes(path: str, kernel: jax.ShapeDtypeStruct, kind: str, tile: int) -> Quantized:
    width_in = kernel.shape[-2]
    if width_in % tile:
        raise InputError(
            f"tile={tile}: must divide the {width_in} inputs of {path}; "
            f"take another tile, or leave the layer as it is: "
            f"pattern.{path.rpartition('.')[2]}=none"
        )
    return shapes(kernel, kind, tile)
