"""Adapters into and out of any nnx module; knows no model.

    model = inject(model, DropLoRA(rank=32), key=init_key)
    graphdef, adapters, mask_keys, frozen = split(model)
    model = nnx.merge(graphdef, adapters, draw(mask_keys, step_key, rows=row_ids), frozen)
    plain = merge(model)

All of them return new modules and leave their input as it was. They share its variables, so give
a module another variable rather than set the value of one in place.
"""

from __future__ import annotations

from typing import TypeVar, cast

import jax
import jax.numpy as jnp
from flax import nnx
from jaxtyping import Array, Float, Int, Key

from droplora_jax.adapters.base import Adapter, AdapterConfig, InitKey
from droplora_jax.adapters.fully_trained import plain, train_whole, wholes_of
from droplora_jax.adapters.low_rank_layer import Initial
from droplora_jax.core import prng
from droplora_jax.core.errors import InputError
from droplora_jax.nn.layer_paths import Path, check_patterns, dotted, layer_names, select
from droplora_jax.nn.linear_spec import is_linear, linear_spec, stack_of
from droplora_jax.nn.mask_keys import DropShare, MaskKey

Model = TypeVar("Model", bound=nnx.Module)
Parts = tuple[nnx.GraphDef, nnx.State, nnx.State, nnx.State]


def adapters_of(model: nnx.Module) -> dict[str, Adapter]:
    """All adapters by the dotted path of the layer that they wrap."""
    return {dotted(path): node for path, node in nnx.iter_graph(model) if isinstance(node, Adapter)}


def inject(model: Model, config: AdapterConfig, *, key: InitKey) -> Model:
    """Wrap every targeted linear layer in an adapter.

    Args:
      model: any nnx module; layers may be in a list, or stacked with leading axes.
      config: which layers and which adapter, such as `DropLoRA`; and which parameters of the base
        are trained.
      key: the root of the initial values, which depend on it, the path and the layer index only;
        `later` for zeros, where a checkpoint is about to fill them; None for shapes only, with no
        values, as a plan needs.

    Raises:
      InputError: a pattern that matches nothing (lists the layers), or a model that has
        adapters already.

    >>> import droplora_jax as dl
    >>> layers = [nnx.Linear(4, 4, rngs=nnx.Rngs(i)) for i in range(2)]
    >>> model = nnx.Sequential(layers[0], nnx.relu, layers[1])
    >>> config = dl.DropLoRA(rank=2, targets="all-linear")
    >>> adapted = dl.inject(model, config, key=dl.root_key(0))
    >>> adapted.layers[0].rank, type(model.layers[0]).__name__  # the model itself is as it was
    (2, 'Linear')
    >>> x = jnp.ones((3, 4))
    >>> bool(jnp.array_equal(adapted(x), model(x)))  # B is zero at first
    True
    """
    if present := adapters_of(model):
        raise InputError(
            f"the model has adapters already ({next(iter(present))}, {len(present)} in all): "
            "merge(model) first, or inject into the plain model"
        )
    model = view(model)
    linear = {path: node for path, node in nnx.iter_graph(model) if is_linear(node)}
    stacks = {path: stack_of(node) for path, node in linear.items()}
    targets = (config.targets,) if isinstance(config.targets, str) else config.targets
    chosen = select(stacks, targets, config.exclude)
    check_patterns(config.patterns, {path: layer_names(path, stacks[path]) for path in chosen})
    specs = {path: linear_spec(linear[path]) for path in chosen}
    kernels = {(*path, specs[path].attribute) for path in chosen}
    train_whole(model, config.train_whole, kernels, abstract=key is None)

    def wrap(path: Path, node: object) -> object:
        if path not in chosen or not isinstance(node, nnx.Module):
            return node
        return config.adapt(node, specs[path], path, key, chosen[path])

    return nnx.recursive_map(wrap, model)


def split(model: nnx.Module) -> Parts:
    """`graphdef, adapters, mask_keys, frozen`: differentiate with respect to `adapters` only.

    >>> import droplora_jax as dl
    >>> layers = [nnx.Linear(4, 4, rngs=nnx.Rngs(i)) for i in range(2)]
    >>> model = nnx.Sequential(layers[0], nnx.relu, layers[1])
    >>> config = dl.DropLoRA(rank=2, targets="all-linear")
    >>> adapted = dl.inject(model, config, key=dl.root_key(0))
    >>> graphdef, adapters, mask_keys, frozen = dl.split(adapted)
    >>> sorted(adapters["layers"][0])
    ['lora_a', 'lora_b']
    >>> nnx.merge(graphdef, adapters, mask_keys, frozen)(jnp.ones((3, 4))).shape
    (3, 4)
    """
    # LoRAParam is a subclass of Param: it has to come first.
    return cast(Parts, nnx.split(model, nnx.LoRAParam, MaskKey, ...))


def initial_of(frozen: nnx.State) -> nnx.State:
    """The frozen initial factors (A0, B0), which a checkpoint must store."""
    return nnx.filter_state(frozen, Initial)


@jax.named_scope("mask")
def draw(
    mask_keys: nnx.State,
    step_key: Key[Array, ""],
    *,
    rows: Int[Array, "B"] | None = None,
    documents: Int[Array, "B T"] | None = None,
    share: float | Float[Array, ""] | None = None,
) -> nnx.State:
    """Turn the masks on for one step.

    The keys depend on `step_key`, the module's path, the layer index, and, where the granularity
    asks for it, the row and the document; never on the mesh or on any order.

    Args:
      mask_keys: the third part of `split`.
      step_key: the run's mask key with the step folded in; another one every step.
      rows: the index of each row in the step's whole batch. Needed at `token` and `sequence`.
      documents: the document of each position, for packed rows at `sequence`: their segment ids.
      share: of the drop rates in this step, for adapters whose rates change over a run.

    Raises:
      InputError: `rows` or `share` is missing.

    >>> import droplora_jax as dl
    >>> layers = [nnx.Linear(4, 4, rngs=nnx.Rngs(i)) for i in range(2)]
    >>> model = nnx.Sequential(layers[0], nnx.relu, layers[1])
    >>> config = dl.DropLoRA(rank=2, targets="all-linear")
    >>> adapted = dl.inject(model, config, key=dl.root_key(0))
    >>> graphdef, adapters, mask_keys, frozen = dl.split(adapted)
    >>> keys = dl.draw(mask_keys, dl.root_key(1), rows=jnp.arange(3))
    >>> nnx.merge(graphdef, adapters, keys, frozen)(jnp.ones((3, 4))).shape
    (3, 4)
    """

    def fill(path: Path, variable: nnx.Variable) -> nnx.Variable:
        if isinstance(variable, DropShare):
            return variable.replace(_everywhere(share, variable))
        granularity = variable.get_metadata("granularity")
        if granularity is None:
            return variable
        keys = prng.fold_path(step_key, path[:-1])
        if path[-1] != "mask_key":
            keys = prng.fold_name(keys, path[-1])
        keys = prng.fold_stack(keys, variable.get_metadata("stack"))
        if granularity == "step":
            return variable.replace(keys[..., None])
        if rows is None:
            raise InputError(
                f"granularity {granularity!r} draws a mask per row: pass rows=, the index of each "
                "row in the step's batch, such as jnp.arange(batch_size)"
            )
        keys = prng.fold_each(keys, rows)
        if granularity == "sequence":
            # A row that is not packed is one document, the first of its row.
            of_row = jnp.ones_like(rows) if documents is None else documents
            keys = prng.fold_rows(keys, of_row)
        return variable.replace(keys)

    return nnx.map_state(fill, mask_keys)


def _everywhere(share: float | Float[Array, ""] | None, variable: DropShare) -> Array:
    if share is None:
        raise InputError(
            "the drop rates change over the run (drop_schedule, drop_warmup_steps): pass share=, "
            "the share of them at this step, config.share(steps)(step) of the adapters' config"
        )
    return jnp.broadcast_to(jnp.asarray(share, jnp.float32), variable.get_value().shape)


def masked(
    model: Model,
    step_key: Key[Array, ""],
    *,
    rows: Int[Array, "B"] | None = None,
    documents: Int[Array, "B T"] | None = None,
    share: float | Float[Array, ""] | None = None,
) -> Model:
    """A view of the model with its masks on for one step, for loops that hold a whole model.

    The view shares its parameters with `model`: differentiate the view, update `model`.

    >>> import droplora_jax as dl
    >>> layers = [nnx.Linear(4, 4, rngs=nnx.Rngs(i)) for i in range(2)]
    >>> model = nnx.Sequential(layers[0], nnx.relu, layers[1])
    >>> config = dl.DropLoRA(rank=2, targets="all-linear")
    >>> adapted = dl.inject(model, config, key=dl.root_key(0))
    >>> dl.masked(adapted, dl.root_key(1), rows=jnp.arange(3))(jnp.ones((3, 4))).shape
    (3, 4)
    """
    graphdef, adapters, mask_keys, frozen = split(model)
    keys = draw(mask_keys, step_key, rows=rows, documents=documents, share=share)
    return nnx.merge(graphdef, adapters, keys, frozen)


def merge(model: Model) -> Model:
    """The plain model, adapters folded into the kernels: same classes and paths as before `inject`.

    The sum is made in float32 and cast once, to the kernel's dtype.

    >>> import droplora_jax as dl
    >>> layers = [nnx.Linear(4, 4, rngs=nnx.Rngs(i)) for i in range(2)]
    >>> model = nnx.Sequential(layers[0], nnx.relu, layers[1])
    >>> config = dl.DropLoRA(rank=2, targets="all-linear")
    >>> adapted = dl.inject(model, config, key=dl.root_key(0))
    >>> plain = dl.merge(adapted)
    >>> type(plain.layers[0]).__name__
    'Linear'
    """

    def unwrap(path: Path, node: object) -> object:
        return node.merged() if isinstance(node, Adapter) else node

    merged = nnx.recursive_map(unwrap, view(model))
    plain(merged)
    return merged


def without_adapters(model: Model) -> Model:
    """The model that adapters were put on, with the same arrays, to put others on.

    Raises:
      InputError: parameters of the base were trained, so the base is not what it was.

    >>> import droplora_jax as dl
    >>> layers = [nnx.Linear(4, 4, rngs=nnx.Rngs(i)) for i in range(2)]
    >>> model = nnx.Sequential(layers[0], nnx.relu, layers[1])
    >>> config = dl.DropLoRA(rank=2, targets="all-linear")
    >>> adapted = dl.inject(model, config, key=dl.root_key(0))
    >>> dl.without_adapters(adapted).layers[0].kernel[...] is model.layers[0].kernel[...]
    True
    """
    if wholes := wholes_of(model):
        raise InputError(f"{dotted(next(iter(wholes)))} is trained whole: load the base again")

    def unwrap(path: Path, node: object) -> object:
        return node.base if isinstance(node, Adapter) else node

    return nnx.recursive_map(unwrap, view(model))


def view(model: Model) -> Model:
    """New modules over the same variables: an attribute set on one is not set on the other."""
    return nnx.merge(*nnx.split(model))
