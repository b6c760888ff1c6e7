"""A flax.linen model as an nnx module, so that adapters go into it as into every other.

    model = linen.to_nnx(linen_model, params, tokens)      # the same paths, the same arrays
    model = dl.inject(model, dl.DropLoRA(rank=32), key=key)
    logits = dl.masked(model, step_key, rows=rows)(tokens)  # linen's `apply`, branches beside it
    params = linen.params_of(dl.merge(model))              # a plain tree again

Each linear layer of linen has a `LinenLayer` here that holds its parameters, and calls of one with
an adapter are intercepted. What an adapter needs travels in linen's `params`, beside the layer's
own: under `nn.scan` a layer sees its slice of those, and of nothing that comes another way.
"""

from __future__ import annotations

import re
from collections import defaultdict
from collections.abc import Callable, Mapping
from typing import Any, TypeAlias

import jax
from flax import core, nnx
from flax import linen as nn
from flax.linen.module import InterceptorContext as Context
from jaxtyping import Array

from droplora_jax.adapters.base import Adapter
from droplora_jax.core.errors import InputError
from droplora_jax.nn.layer_paths import dotted
from droplora_jax.nn.linear_spec import (
    LinearSpec,
    einsum_spec,
    general_spec,
    is_linear,
    linear_spec,
)

Path = tuple[str, ...]
Node = Any  # of linen's trees: an array, or a mapping of nodes
Tree = Mapping[str, Node]
Arguments: TypeAlias = tuple[object, ...]
Named: TypeAlias = dict[str, Any]
ADAPTER = "adapter"  # where an adapter's arrays are in the parameters of its layer


class Parameters(nnx.Module):
    """What one linen module has in `params`: `nnx.Param`s, and modules of the same names.

    Modules `layers_0`, `layers_1`, ... are the list `layers`, as they are in nnx: so their masks
    and first values are those of such a list, and of stacked layers.
    """

    def __init__(self, children: Tree) -> None:
        for name, child in _with_lists(children).items():
            if not name.isidentifier() or name.startswith("_") or hasattr(self, name):
                raise InputError(f"{name!r} in linen's params can't be the name of an attribute")
            setattr(self, name, child)


class LinenLayer(Parameters):
    """The parameters of a linear layer, called by what linen calls."""

    def __init__(self, children: Tree, spec: LinearSpec | str) -> None:
        self.spec = spec
        self.call: Callable[..., Any] | None = None
        super().__init__(children)

    def __call__(self, *args: object, **kwargs: Any) -> Any:
        if self.call is None:
            raise InputError("a layer of a linen model is called by the model alone")
        return self.call(*args, **kwargs)


class LinenModel(Parameters):
    """A linen model over its own parameters; made by `to_nnx`."""

    def __init__(self, module: nn.Module, children: Tree) -> None:
        self.linen_module = module
        super().__init__(children)

    def __call__(self, *args: object, **kwargs: Any) -> Any:
        """`apply` of the linen model, with the branches of the adapters.

        On `params` alone: to decode with a cache, give merged parameters to linen itself.
        """
        adapters: dict[Path, nnx.GraphDef] = {}
        params = _params(self, (), adapters)

        def call(
            layer: Callable[..., Any],
            args: Arguments,
            kwargs: Named,
            context: Context,
        ) -> Any:
            graphdef = adapters.get(context.module.path) if _is_call(context) else None
            if graphdef is None:
                return layer(*args, **kwargs)
            adapter = nnx.merge(graphdef, context.module.get_variable("params", ADAPTER))
            adapter.base.call = layer
            return adapter(*args, **kwargs)

        with nn.intercept_methods(call):
            return self.linen_module.apply({"params": params}, *args, **kwargs)


def to_nnx(module: nn.Module, params: Tree, *args: object, **kwargs: Any) -> LinenModel:
    """A linen model as an nnx module over the same arrays.

    Args:
      params: the collection `params`; boxes of metadata are taken off.
      args, kwargs: what the model is called with, arrays or their shapes: it is traced once, to
        find its linear layers.

    Raises:
      InputError: layers that are stacked along another axis than the first, or a parameter whose
        name can't be an attribute's.
    """
    params = core.unfreeze(nn.meta.unbox(params))
    specs = _linear_layers(module, params, args, kwargs)

    def node(tree: Tree, path: Path) -> Parameters:
        spec = specs.get(path)
        children = _children(tree, path, node)
        return Parameters(children) if spec is None else LinenLayer(children, spec)

    return LinenModel(module, _children(params, (), node))


def params_of(model: LinenModel) -> dict[str, Node]:
    """The parameters as linen has them.

    Raises:
      InputError: the model has adapters, which linen does not know.
    """
    adapters: dict[Path, nnx.GraphDef] = {}
    params = _params(model, (), adapters)
    if adapters:
        raise InputError(f"{dotted(next(iter(adapters)))} has an adapter: merge(model) first")
    return params


@linear_spec.register(LinenLayer)
def _of_layer(layer: LinenLayer) -> LinearSpec:
    if isinstance(layer.spec, str):
        raise InputError(layer.spec)
    return layer.spec


@linear_spec.register(nn.Dense)
def _dense(layer: nn.Dense) -> LinearSpec:
    return LinearSpec("...i", "io", "...o")


@linear_spec.register(nn.DenseGeneral)
def _dense_general(layer: nn.DenseGeneral) -> LinearSpec:
    if layer.batch_dims:
        raise InputError(
            f"nn.DenseGeneral with batch_dims={tuple(layer.batch_dims)} can't be adapted: "
            "leave it out of the targets"
        )
    return general_spec(layer.axis, layer.features)


@linear_spec.register(nn.Einsum)
def _einsum(layer: nn.Einsum) -> LinearSpec:
    if layer.einsum_str is None:
        raise InputError("nn.Einsum without an einsum_str of its own can't be adapted: give it one")
    return einsum_spec(layer.einsum_str)


def _linear_layers(
    module: nn.Module, params: Tree, args: Arguments, kwargs: Named
) -> dict[Path, LinearSpec | str]:
    """Every linear layer that a call reaches: how to read it, or why it can't be adapted."""
    specs: dict[Path, LinearSpec | str] = {}

    def record(layer: Callable[..., Any], args: Arguments, kwargs: Named, context: Context) -> Any:
        if _is_call(context) and is_linear(context.module):
            specs[context.module.path] = _read(context.module, params)
        return layer(*args, **kwargs)

    with nn.intercept_methods(record):
        jax.eval_shape(lambda *args: module.apply({"params": params}, *args, **kwargs), *args)
    return specs


def _read(layer: nn.Module, params: Tree) -> LinearSpec | str:
    try:
        spec = linear_spec(layer)
    except InputError as error:
        return str(error)
    kernel: Any = params
    for name in (*layer.path, spec.attribute):
        kernel = kernel[name]
    seen: Array = layer.get_variable("params", spec.attribute)
    if kernel.shape[-seen.ndim :] != seen.shape:
        raise InputError(
            f"{dotted(layer.path)} is {seen.shape}, stacked {kernel.shape}: stack the layers along "
            "the first axis (nn.scan's variable_axes={'params': 0})"
        )
    return spec


def _is_call(context: Context) -> bool:
    return context.method_name == "__call__"


def _children(tree: Tree, path: Path, node: Callable[..., Any]) -> dict[str, Node]:
    return {
        name: node(child, (*path, name)) if isinstance(child, Mapping) else nnx.Param(child)
        for name, child in tree.items()
    }


def _with_lists(children: Tree) -> dict[str, Node]:
    """Modules named `name_0`, `name_1`, ... with none missing as one list `name`."""
    numbered: dict[str, dict[int, str]] = defaultdict(dict)
    for name, child in children.items():
        match = re.fullmatch(r"(.+)_(0|[1-9]\d*)", name)
        if match and isinstance(child, nnx.Module):
            numbered[match[1]][int(match[2])] = name
    rest = dict(children)
    lists = {}
    for stem, names in numbered.items():
        if sorted(names) == list(range(len(names))) and stem not in children:
            lists[stem] = nnx.List([rest.pop(names[i]) for i in range(len(names))])
    return rest | lists


def _params(node: nnx.Module, path: Path, adapters: dict[Path, nnx.GraphDef]) -> dict[str, Node]:
    """linen's tree of a module's arrays, the adapters' beside their layers'; fills `adapters`."""
    if isinstance(node, Adapter):
        adapters[path], state = nnx.split(node)
        return {**_params(node.base, path, {}), ADAPTER: state}
    tree: dict[str, Node] = {}
    for name, child in vars(node).items():
        if isinstance(child, nnx.Variable):
            tree[name] = child.get_value()
        elif isinstance(child, nnx.List):
            for i, item in enumerate(child):
                tree[f"{name}_{i}"] = _params(item, (*path, f"{name}_{i}"), adapters)
        elif isinstance(child, nnx.Module):
            tree[name] = _params(child, (*path, name), adapters)
    return tree
