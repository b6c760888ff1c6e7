"""The weights of a Hugging Face folder, read slice by slice onto the devices of a mesh."""

from __future__ import annotations

import math
import os
from collections.abc import Mapping
from concurrent.futures import ThreadPoolExecutor
from dataclasses import replace
from pathlib import Path
from typing import TypeVar

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx
from jax.sharding import Mesh, NamedSharding, PartitionSpec
from jax.typing import DTypeLike

from droplora_jax.core.errors import InputError
from droplora_jax.core.sharding import named_sharding
from droplora_jax.hf.tensor_files import Each, TensorFiles, open_source
from droplora_jax.models.config import ModelConfig, Source
from droplora_jax.models.decoder import Decoder
from droplora_jax.models.families import FAMILIES
from droplora_jax.models.parameter_table import LOGICAL_AXES, TensorName
from droplora_jax.models.quantization import quantized_shapes
from droplora_jax.nn.layer_paths import Path as ModulePath
from droplora_jax.nn.layer_paths import dotted
from droplora_jax.nn.options import Quantization
from droplora_jax.nn.quantized_kernel import Quantized, with_layer

TIED_HEAD = "lm_head.weight"  # a copy of the embedding, in the files of some tied models
ENDS = ("embed", "lm_head")  # of a decoder, whose sizes depend on the vocabulary

Module = TypeVar("Module", bound=nnx.Module)


def abstract_model(
    config: ModelConfig,
    *,
    mesh: Mesh,
    dtype: DTypeLike,
    source: Source | None = None,
    quantization: Quantization | None = None,
) -> Decoder:
    """The model with shapes, dtypes and shardings in place of arrays."""
    model = nnx.eval_shape(
        lambda: Decoder(config, rngs=nnx.Rngs(0), dtype=dtype, mesh=mesh, source=source)
    )
    if quantization is not None:
        model = quantized_shapes(model, quantization)

    def place(path: ModulePath, parameter: nnx.Variable) -> nnx.Variable:
        def placed(leaf: jax.ShapeDtypeStruct) -> jax.ShapeDtypeStruct:
            sharding = named_sharding(mesh, LOGICAL_AXES[dotted(path)], leaf.shape)
            return jax.ShapeDtypeStruct(leaf.shape, leaf.dtype, sharding=sharding)

        value = jax.tree.map(placed, parameter.get_value())
        if isinstance(value, Quantized) and mesh.size > 1:
            value = replace(value, gathered=_without_width(path, value))
        return parameter.replace(value)

    graphdef, state = nnx.split(model)
    return nnx.merge(graphdef, nnx.map_state(place, state))


def _without_width(path: ModulePath, stack: Quantized) -> NamedSharding:
    """Where a layer of a stack lies when what is split over `width` is gathered."""
    _, *spec = stack.sharding.spec
    _, *axes = LOGICAL_AXES[dotted(path)]
    entries = [None if axis == "width" else entry for axis, entry in zip(axes, spec, strict=True)]
    return NamedSharding(stack.sharding.mesh, PartitionSpec(*entries))


def read_weights(source: Source, model: Decoder) -> Decoder:
    """An abstract model with the weights of its source, each read onto its devices.

    Raises:
      InputError: the source's tensors are not the model's, or one of them is not finite.
    """
    weights = open_source(source)
    check_tensors(weights, source.folder, model)
    names = FAMILIES[model.config.family].tensor_names(model.config)
    return _filled(model, "", names, weights)


def with_ends(model: Decoder, config: ModelConfig, source: Source) -> Decoder:
    """A view of a model with the ends that it has in another shape, read from another source.

    The ends are the embedding and the head. Where they are shapes only, they stay shapes.

    Args:
      config: of the same layers.
    """
    if (model.config, model.source) == (config, source):
        return model
    assert model.mesh is not None
    other = abstract_model(config, mesh=model.mesh, dtype=model.dtype, source=source)
    if not isinstance(model.embed.embedding.get_value(), jax.ShapeDtypeStruct):
        names, weights = FAMILIES[config.family].tensor_names(config), open_source(source)
        for name in ENDS:
            if hasattr(other, name):
                setattr(other, name, _filled(getattr(other, name), f"{name}.", names, weights))
    model = nnx.merge(*nnx.split(model))
    model.config, model.source = config, source
    for name in ENDS:
        if hasattr(other, name):
            setattr(model, name, getattr(other, name))
        elif hasattr(model, name):
            delattr(model, name)
    return model


def _filled(
    module: Module, prefix: str, names: Mapping[str, TensorName], weights: TensorFiles
) -> Module:
    """An abstract module with its weights; `prefix` is its path in the model, and a dot."""
    graphdef, state = nnx.split(module)
    with ThreadPoolExecutor(os.cpu_count()) as pool:

        def read(path: ModulePath, parameter: nnx.Variable) -> nnx.Variable:
            leaf, name = parameter.get_value(), names[prefix + dotted(path)]
            of_kind = _read_quantized if isinstance(leaf, Quantized) else _read_sharded
            return parameter.replace(of_kind(weights, name, leaf, pool.map))

        return nnx.merge(graphdef, nnx.map_state(read, state))


def check_tensors(weights: TensorFiles, folder: Path, model: Decoder) -> None:
    """Raise InputError unless the folder holds the model's tensors, in their shapes, no others."""
    family = FAMILIES[model.config.family]
    names = family.tensor_names(model.config)
    expected: dict[str, tuple[int, ...]] = {}
    for path, parameter in nnx.to_flat_state(nnx.state(model)):
        name = names[dotted(path)]
        shape = parameter.get_value().shape
        own_shape = shape[1:] if name.stacked else shape
        own_shape = own_shape[::-1] if name.transposed else own_shape
        for layer in range(shape[0] if name.stacked else 1):
            expected[name.of_layer(layer)] = own_shape
    found = weights.files
    if missing := [name for name in expected if name not in found]:
        tied = names["embed.embedding"].pattern in found and missing == [TIED_HEAD]
        reason = (
            'if the head is the embedding, config.json lacks "tie_word_embeddings": true'
            if tied
            else "config.json does not describe these weights, or a shard is missing"
        )
        raise InputError(
            f"{folder}: {len(missing)} tensor(s) missing, such as {missing[0]}; {reason}"
        )
    for tensor, shape in expected.items():
        if weights.shape(tensor) != shape:
            raise InputError(
                f"{found[tensor]}: {tensor} has shape {list(weights.shape(tensor))}, "
                f"but config.json asks for {list(shape)}"
            )
    copies = {TIED_HEAD} if model.config.tie_embeddings else set()
    for tensor in found:
        if tensor not in expected and tensor not in copies and not tensor.endswith(family.buffers):
            raise InputError(
                f"{found[tensor]}: tensor {tensor} has no place in this model; config.json doesn't "
                "describe these weights (biases, more layers, or another architecture?)"
            )


def _read_sharded(
    weights: TensorFiles, name: TensorName, leaf: jax.ShapeDtypeStruct, each: Each
) -> jax.Array:
    """A parameter on its devices, one device's part in host memory at a time."""
    parts = []
    for device, index in leaf.sharding.addressable_devices_indices_map(leaf.shape).items():
        index = tuple(index or ())
        shape = leaf.sharding.shard_shape(leaf.shape)
        part = _aligned_empty(shape, np.dtype(leaf.dtype))
        if name.stacked:
            layers = range(*index[0].indices(leaf.shape[0]))
            for out, layer in zip(part, layers, strict=True):
                _read_tensor(weights, name.of_layer(layer), out, index[1:], name.transposed, each)
        else:
            _read_tensor(weights, name.pattern, part, index, name.transposed, each)
        parts.append(jax.device_put(part, device).block_until_ready())
    return jax.make_array_from_single_device_arrays(leaf.shape, leaf.sharding, parts)


def _read_quantized(
    weights: TensorFiles, name: TensorName, leaf: Quantized, each: Each
) -> Quantized:
    """A stack of quantised kernels, one layer of it in full precision at a time."""
    shardings = jax.tree.map(lambda x: x.sharding, leaf)
    zeros = jax.jit(
        lambda: jax.tree.map(lambda x: jnp.zeros(x.shape, x.dtype), leaf), out_shardings=shardings
    )
    write = jax.jit(with_layer, donate_argnums=0, out_shardings=shardings)
    layers, *shape = leaf.shape
    of_one = NamedSharding(leaf.sharding.mesh, PartitionSpec(*leaf.sharding.spec[1:]))
    one = jax.ShapeDtypeStruct(shape, jnp.float32, sharding=of_one)
    stack = zeros()
    for layer in range(layers):
        tensor = TensorName(name.of_layer(layer), name.transposed)
        kernel = _read_sharded(weights, tensor, one, each)
        stack = jax.block_until_ready(write(stack, kernel, jnp.int32(layer)))
    return stack


def _read_tensor(
    weights: TensorFiles,
    name: str,
    out: np.ndarray,
    index: tuple[slice, ...],
    transposed: bool,
    each: Each,
) -> None:
    index = index[::-1] if transposed else index
    weights.read_into(out, name, index, transposed=transposed, each=each)


def _aligned_empty(shape: tuple[int, ...], dtype: np.dtype) -> np.ndarray:
    """Memory that a CPU device takes over as it is: XLA wants 64 bytes of alignment."""
    size = math.prod(shape) * dtype.itemsize
    raw = np.empty(size + 64, np.uint8)
    begin = -raw.ctypes.data % 64
    return raw[begin : begin + size].view(dtype).reshape(shape)
