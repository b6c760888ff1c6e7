"""An optax optimizer and its learning-rate schedule from a configuration."""

from __future__ import annotations

import difflib
import inspect
import math
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from types import MappingProxyType
from typing import Any, Literal

import jax
import jax.numpy as jnp
import optax

from droplora_jax.errors import InputError

Schedule = Literal["constant", "linear", "cosine"]


@dataclass(frozen=True)
class OptimConfig:
    """The optimizer; the defaults are the recipe behind the published numbers.

    Attributes:
      name: any optimizer of optax that takes a learning rate, such as `adamw`, `lion`, `sgd`.
      schedule: what follows the warm-up: `constant`, or down to zero by `linear` or `cosine`.
      warmup_steps: steps in which the learning rate rises from zero.
      weight_decay: passed to optimizers that have it; must be 0 for others.
      clip_norm: gradients are scaled down to this global norm; null for no clipping.
      options: further arguments of the optimizer, such as `b2: 0.95`.
    """

    name: str = "adamw"
    learning_rate: float = 3e-4
    schedule: Schedule = "linear"
    warmup_steps: int = 100
    weight_decay: float = 0.1
    clip_norm: float | None = 1.0
    options: dict[str, float | bool | str] = field(default_factory=dict)

    def __post_init__(self) -> None:
        if not (self.learning_rate > 0 and math.isfinite(self.learning_rate)):
            raise InputError(f"optim.learning_rate={self.learning_rate}: must be positive")
        if self.warmup_steps < 0:
            raise InputError(f"optim.warmup_steps={self.warmup_steps}: must not be negative")
        if not (self.weight_decay >= 0 and math.isfinite(self.weight_decay)):
            raise InputError(f"optim.weight_decay={self.weight_decay}: must not be negative")
        if self.clip_norm is not None and not self.clip_norm > 0:
            raise InputError(f"optim.clip_norm={self.clip_norm}: must be positive, or null")
        _try_out(self)  # what can't work should stop the run before a model is loaded


def learning_rate(config: OptimConfig, steps: int) -> optax.Schedule:
    """The learning rate of each step of a run of `steps` steps."""
    if config.warmup_steps >= steps:
        raise InputError(
            f"optim.warmup_steps={config.warmup_steps}: must be below the run's {steps} steps, or "
            "the learning rate never reaches its value; lower it, or train for longer"
        )
    decay = DECAYS[config.schedule](config.learning_rate, steps - config.warmup_steps)
    if not config.warmup_steps:
        return decay
    warmup = optax.linear_schedule(0.0, config.learning_rate, config.warmup_steps)
    return optax.join_schedules([warmup, decay], [config.warmup_steps])


DECAYS: Mapping[str, Callable[[float, int], optax.Schedule]] = MappingProxyType(
    {
        "constant": lambda rate, steps: optax.constant_schedule(rate),
        "linear": lambda rate, steps: optax.linear_schedule(rate, 0.0, steps),
        "cosine": lambda rate, steps: optax.cosine_decay_schedule(rate, steps),
    }
)


def optimizer(config: OptimConfig, schedule: optax.Schedule) -> optax.GradientTransformation:
    """Clipping, then the named optimizer."""
    update = getattr(optax, config.name)(schedule, **_arguments(config))
    if config.clip_norm is None:
        return update
    return optax.chain(optax.clip_by_global_norm(config.clip_norm), update)


def _try_out(config: OptimConfig) -> None:
    """Raise InputError unless one update works with a gradient alone and a schedule."""
    arguments = _arguments(config)
    parameters = {"w": jax.ShapeDtypeStruct((2, 2), jnp.float32)}
    try:
        tx = getattr(optax, config.name)(optax.constant_schedule(1e-3), **arguments)
        jax.eval_shape(lambda p: tx.update(p, tx.init(p), p), parameters)
    except Exception as error:
        raise InputError(
            f"optim.name={config.name!r}: can't be used with {arguments} here ({error})"
        ) from error


def _arguments(config: OptimConfig) -> dict[str, Any]:
    names = _optimizer_names()
    if config.name not in names:
        near = difflib.get_close_matches(config.name, names, n=1)
        hint = f"did you mean {near[0]}? " if near else ""
        raise InputError(
            f"optim.name={config.name!r}: optax has no such optimizer; {hint}"
            f"there are {', '.join(names)}"
        )
    parameters = _parameters(getattr(optax, config.name))
    arguments: dict[str, Any] = dict(config.options)
    if "learning_rate" in arguments:
        raise InputError("optim.options.learning_rate: belongs to optim.learning_rate")
    if "weight_decay" in parameters:
        arguments.setdefault("weight_decay", config.weight_decay)
    elif config.weight_decay:
        raise InputError(
            f"optim.weight_decay={config.weight_decay}: optax.{config.name} has no weight decay; "
            "set optim.weight_decay: 0"
        )
    if unknown := set(arguments) - set(parameters):
        raise InputError(
            f"optim.options.{min(unknown)}: optax.{config.name} has no such argument; "
            f"it has {', '.join(parameters)}"
        )
    return arguments


def _optimizer_names() -> list[str]:
    public = (name for name in dir(optax) if not name.startswith(("_", "scale_by")))
    return [name for name in public if "learning_rate" in _parameters(getattr(optax, name))]


def _parameters(make: Any) -> Mapping[str, inspect.Parameter]:
    return inspect.signature(make).parameters if inspect.isfunction(make) else {}
