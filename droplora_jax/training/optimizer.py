"""An optax optimizer and its learning-rate schedule from a configuration."""

from __future__ import annotations

import inspect
import re
from collections.abc import Mapping, Sequence
from functools import partial
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import optax

from droplora_jax.core.errors import InputError, did_you_mean
from droplora_jax.core.schedules import schedule
from droplora_jax.training.config import OptimConfig


class Optimizer(NamedTuple):
    """An optimizer and the learning rate that it takes at each step, counted from 0."""

    tx: optax.GradientTransformation
    learning_rate: optax.Schedule


def build(config: OptimConfig, steps: int) -> Optimizer:
    """The optimizer of a run of `steps` steps.

    Raises:
      InputError: an option that the optimizer does not have, an optimizer that needs more than a
        gradient, or a warm-up that is not over before the run is; it names the field of `config`.
        From `tx.init`: a pattern of `no_decay` that matches nothing.
    """
    rate = learning_rate(config, steps)
    return Optimizer(optimizer(config, rate), rate)


def learning_rate(config: OptimConfig, steps: int) -> optax.Schedule:
    """The learning rate of each step of a run of `steps` steps."""
    return schedule(
        config.learning_rate, config.schedule, config.warmup_steps, steps, name="warmup_steps"
    )


def optimizer(config: OptimConfig, rate: optax.Schedule) -> optax.GradientTransformation:
    """Clipping, then the named optimizer, then the factor of every B (LoRA+).

    Raises:
      InputError: see `build`.
    """
    arguments = check(config)
    if config.no_decay:
        arguments["mask"] = partial(_decayed, config.no_decay)
    parts = [getattr(optax, config.name)(rate, **arguments)]
    if config.clip_norm is not None:
        parts.insert(0, optax.clip_by_global_norm(config.clip_norm))
    if config.b_ratio != 1:
        parts.append(optax.masked(optax.scale(config.b_ratio), partial(_matching, r"lora_b$")))
    return optax.chain(*parts) if len(parts) > 1 else parts[0]


def check(config: OptimConfig) -> dict[str, Any]:
    """The arguments of the named optimizer, but for the learning rate and what it decays.

    Raises:
      InputError: see `build`.
    """
    arguments = _arguments(config)
    _try_out(config.name, arguments)
    return arguments


def _decayed(no_decay: Sequence[str], trained: optax.Params) -> optax.Params:
    """A tree like `trained`: whether each array is decayed."""
    matches = [_matching(pattern, trained) for pattern in no_decay]
    for pattern, matching in zip(no_decay, matches, strict=True):
        if not any(jax.tree.leaves(matching)):
            paths = sorted({_dotted(path) for path, _ in jax.tree.leaves_with_path(trained)})
            raise InputError(
                f"no_decay={pattern!r} matches nothing that is trained; there are "
                f"{', '.join(paths[:20])}{', ...' if len(paths) > 20 else ''}"
            )
    return jax.tree.map(lambda *matching: not any(matching), *matches)


def _matching(pattern: str, trained: optax.Params) -> optax.Params:
    """A tree like `trained`: whether the path of each array contains a pattern."""
    return jax.tree.map_with_path(
        lambda path, _: re.search(pattern, _dotted(path)) is not None, trained
    )


def _dotted(path: tuple[object, ...]) -> str:
    keys = (getattr(key, "key", getattr(key, "name", None)) for key in path)
    return ".".join(str(key) for key in keys if key not in (None, "value"))


def _try_out(name: str, arguments: Mapping[str, object]) -> None:
    """Raise InputError unless one update works with a gradient alone and a schedule."""
    parameters = {"w": jax.ShapeDtypeStruct((2, 2), jnp.float32)}
    try:
        tx = getattr(optax, name)(optax.constant_schedule(1e-3), **arguments)
        _, state = jax.eval_shape(lambda p: tx.update(p, tx.init(p), p), parameters)
    except Exception as error:
        raise InputError(f"name={name!r}: can't be used with {arguments} here ({error})") from error
    if any(jnp.issubdtype(leaf.dtype, jax.dtypes.prng_key) for leaf in jax.tree.leaves(state)):
        raise InputError(
            f"name={name!r}: its state holds a random key, which no checkpoint keeps; take an "
            "optimizer without one"
        )


def _arguments(config: OptimConfig) -> dict[str, Any]:
    """The arguments of the named optimizer, but for the learning rate."""
    names = optimizer_names()
    if config.name not in names:
        hint = f"{near} " if (near := did_you_mean(config.name, names)) else ""
        raise InputError(
            f"name={config.name!r}: optax has no such optimizer; {hint}there are {', '.join(names)}"
        )
    parameters = _parameters(getattr(optax, config.name))
    arguments: dict[str, Any] = dict(config.options)
    if "learning_rate" in arguments:
        raise InputError("options.learning_rate: belongs to learning_rate")
    if "weight_decay" in parameters:
        arguments.setdefault("weight_decay", config.weight_decay)
    elif config.weight_decay:
        raise InputError(
            f"weight_decay={config.weight_decay}: optax.{config.name} has no weight decay; set "
            "weight_decay: 0"
        )
    if config.no_decay and "mask" not in parameters:
        raise InputError(
            f"no_decay: optax.{config.name} has no mask of what it decays; leave the key out"
        )
    if unknown := set(arguments) - set(parameters):
        raise InputError(
            f"options.{min(unknown)}: optax.{config.name} has no such argument; "
            f"it has {', '.join(parameters)}"
        )
    return arguments


def optimizer_names() -> list[str]:
    """The functions of optax that take a learning rate."""
    public = (name for name in dir(optax) if not name.startswith(("_", "scale_by")))
    return [name for name in public if "learning_rate" in _parameters(getattr(optax, name))]


def _parameters(make: object) -> Mapping[str, inspect.Parameter]:
    return inspect.signature(make).parameters if inspect.isfunction(make) else {}
