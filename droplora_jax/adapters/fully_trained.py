"""Parameters of the base that are trained themselves, beside the adapters: norms, biases, head."""

from __future__ import annotations

from collections.abc import Collection, Sequence
from typing import Any

import jax
import jax.numpy as jnp
from flax import nnx

from droplora_jax.adapters.layout import full, place
from droplora_jax.core.errors import InputError
from droplora_jax.nn.layer_paths import Path, dotted, matches
from droplora_jax.nn.quantized_kernel import Quantized


class Whole(nnx.LoRAParam):
    """A parameter of the base that is trained, in float32; `base_dtype` is what it was before.

    A subclass of `LoRAParam`, so whatever trains the adapters trains it too.
    """


def train_whole(
    model: nnx.Module,
    patterns: Sequence[str],
    kernels: Collection[Path],
    *,
    abstract: bool = False,
) -> None:
    """Turn the parameters whose dotted path a pattern matches into `Whole`s, in place.

    Args:
      kernels: the paths of the kernels that get an adapter.
      abstract: a parameter that is only a shape stays one; if false, it becomes zeros.

    Raises:
      InputError: a pattern that matches nothing, or a kernel with an adapter.
    """
    parameters = {path: node for path, node in nnx.iter_graph(model) if isinstance(node, nnx.Param)}
    for pattern in patterns:
        chosen = [path for path in parameters if matches(pattern, [dotted(path)])]
        if not chosen:
            present = ", ".join(map(dotted, parameters))
            raise InputError(f"train_whole={pattern!r} matches no parameter; there are {present}")
        for path in chosen:
            if path in kernels:
                raise InputError(
                    f"train_whole={pattern!r} matches {dotted(path)}, which has an "
                    "adapter: exclude it there, or train it whole no more"
                )
            if isinstance(parameters[path].get_value(), Quantized):
                raise InputError(
                    f"train_whole={pattern!r} matches {dotted(path)}, which is quantised: "
                    f"give {dotted(path[:-1])} the kind none in model.quantize_pattern"
                )
            set_at(model, path, _whole(parameters[path], abstract))


def wholes_of(model: nnx.Module) -> dict[Path, Whole]:
    """All parameters that are trained whole, by their path in the model."""
    return {path: node for path, node in nnx.iter_graph(model) if isinstance(node, Whole)}


def plain(model: nnx.Module) -> None:
    """Turn every `Whole` back into a parameter of the base's dtype, in place."""
    for path, whole in wholes_of(model).items():
        dtype = whole.get_metadata("base_dtype")
        set_at(model, path, nnx.Param(whole.get_value().astype(dtype)))


def _whole(parameter: nnx.Variable, abstract: bool) -> Whole:
    value = parameter.get_value()
    dtype = jnp.dtype(value.dtype).name
    if isinstance(value, jax.ShapeDtypeStruct):
        shape = value.shape  # to be filled by what is restored or loaded
        value = place(full, (shape, 0.0), value.sharding, abstract=abstract)
    else:
        value = jnp.array(value, jnp.float32)  # a copy: the base is left as it is
    return Whole(value, base_dtype=dtype)


def set_at(model: nnx.Module, path: Path, variable: nnx.Variable) -> None:
    """Give a module of `model` another variable."""
    *owners, last = path
    node: Any = model
    for part in owners:
        node = node[part] if isinstance(part, int) else getattr(node, part)
    setattr(node, last, variable)
