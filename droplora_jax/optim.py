"""An optax optimizer and its learning-rate schedule from a configuration."""

from __future__ import annotations

import inspect
import math
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from types import MappingProxyType
from typing import Any, Literal

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
        if self.weight_decay < 0:
            raise InputError(f"optim.weight_decay={self.weight_decay}: must not be negative")
        if self.clip_norm is not None and self.clip_norm <= 0:
            raise InputError(f"optim.clip_norm={self.clip_norm}: must be positive, or null")
        _arguments(self)  # an unknown name or option should stop the run before a model is loaded


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


def _arguments(config: OptimConfig) -> dict[str, Any]:
    make = getattr(optax, config.name, None)
    parameters = _parameters(make)
    if "learning_rate" not in parameters:
        raise InputError(
            f"optim.name={config.name!r}: optax has no such optimizer; "
            f"there are {', '.join(_optimizer_names())}"
        )
    arguments: dict[str, Any] = dict(config.options)
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
    return [name for name in dir(optax) if "learning_rate" in _parameters(getattr(optax, name))]


def _parameters(make: Any) -> Mapping[str, inspect.Parameter]:
    return inspect.signature(make).parameters if inspect.isfunction(make) else {}
