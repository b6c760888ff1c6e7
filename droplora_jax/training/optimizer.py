"""An optax optimizer and its learning-rate schedule from a configuration."""

from __future__ import annotations

import difflib
import inspect
import math
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from functools import partial
from typing import Any

import jax
import jax.numpy as jnp
import optax

from droplora_jax.core.errors import InputError
from droplora_jax.core.schedules import Schedule, schedule


@dataclass(frozen=True)
class OptimConfig:
    """The optimizer; the defaults are the recipe behind the published numbers.

    Attributes:
      name: any optimizer of optax that takes a learning rate, such as `adamw`, `lion`, `sgd`.
      schedule: what follows the warm-up: `constant`, or down to zero by `linear` or `cosine`.
      warmup_steps: steps in which the learning rate rises from zero.
      weight_decay: passed to optimizers that have it; must be 0 for others.
      no_decay: patterns of what it leaves alone, searched in the paths of what is trained
        (`layers.q_proj.lora_b`).
      b_ratio: the learning rate of every B is so many times that of the rest (LoRA+, arXiv
        2402.12354, which takes 16).
      clip_norm: gradients are scaled down to this global norm; null for no clipping.
      options: further arguments of the optimizer, such as `b2: 0.95`.
    """

    name: str = "adamw"
    learning_rate: float = 3e-4
    schedule: Schedule = "linear"
    warmup_steps: int = 100
    weight_decay: float = 0.1
    no_decay: tuple[str, ...] = ()
    b_ratio: float = 1.0
    clip_norm: float | None = 1.0
    options: dict[str, float | bool | str] = field(default_factory=dict)

    def __post_init__(self) -> None:
        if not (self.learning_rate > 0 and math.isfinite(self.learning_rate)):
            raise InputError(f"optim.learning_rate={self.learning_rate}: must be positive")
        if self.warmup_steps < 0:
            raise InputError(f"optim.warmup_steps={self.warmup_steps}: must not be negative")
        if not (self.weight_decay >= 0 and math.isfinite(self.weight_decay)):
            raise InputError(f"optim.weight_decay={self.weight_decay}: must not be negative")
        if not (self.b_ratio > 0 and math.isfinite(self.b_ratio)):
            raise InputError(f"optim.b_ratio={self.b_ratio}: must be positive; 1 for no difference")
        for pattern in self.no_decay:
            try:
                re.compile(pattern)
            except re.error as error:
                raise InputError(
                    f"optim.no_decay={pattern!r}: not a regular expression ({error})"
                ) from error
        if self.clip_norm is not None and not self.clip_norm > 0:
            raise InputError(f"optim.clip_norm={self.clip_norm}: must be positive, or null")
        _try_out(self)  # what can't work should stop the run before a model is loaded


def learning_rate(config: OptimConfig, steps: int) -> optax.Schedule:
    """The learning rate of each step of a run of `steps` steps."""
    return schedule(
        config.learning_rate,
        config.schedule,
        config.warmup_steps,
        steps,
        name="optim.warmup_steps",
    )


def optimizer(config: OptimConfig, rate: optax.Schedule) -> optax.GradientTransformation:
    """Clipping, then the named optimizer, and what its updates are multiplied by.

    Raises:
      InputError: from its `init`, for a pattern that matches nothing that is trained.
    """
    arguments = _arguments(config)
    if config.no_decay:
        arguments["mask"] = partial(_decayed, config.no_decay)
    parts = [getattr(optax, config.name)(rate, **arguments)]
    if config.clip_norm is not None:
        parts.insert(0, optax.clip_by_global_norm(config.clip_norm))
    if config.b_ratio != 1:
        parts.append(optax.masked(optax.scale(config.b_ratio), partial(_matching, r"lora_b$")))
    return optax.chain(*parts) if len(parts) > 1 else parts[0]


def _decayed(no_decay: Sequence[str], trained: Any) -> Any:
    """Of everything that is trained, whether it is decayed."""
    left_alone = [_matching(pattern, trained) for pattern in no_decay]
    for pattern, found in zip(no_decay, left_alone, strict=True):
        if not any(jax.tree.leaves(found)):
            paths = sorted({_dotted(path) for path, _ in jax.tree.leaves_with_path(trained)})
            raise InputError(
                f"optim.no_decay={pattern!r} matches nothing that is trained; there are "
                f"{', '.join(paths[:20])}{', ...' if len(paths) > 20 else ''}"
            )
    return jax.tree.map(lambda *found: not any(found), *left_alone)


def _matching(pattern: str, trained: Any) -> Any:
    """Of everything that is trained, whether a pattern is in its path."""
    return jax.tree.map_with_path(
        lambda path, _: re.search(pattern, _dotted(path)) is not None, trained
    )


def _dotted(path: tuple[Any, ...]) -> str:
    keys = (getattr(key, "key", getattr(key, "name", None)) for key in path)
    return ".".join(str(key) for key in keys if key not in (None, "value"))


def _try_out(config: OptimConfig) -> None:
    """Raise InputError unless one update works with a gradient alone and a schedule."""
    arguments = _arguments(config)
    parameters = {"w": jax.ShapeDtypeStruct((2, 2), jnp.float32)}
    try:
        tx = getattr(optax, config.name)(optax.constant_schedule(1e-3), **arguments)
        _, state = jax.eval_shape(lambda p: tx.update(p, tx.init(p), p), parameters)
    except Exception as error:
        raise InputError(
            f"optim.name={config.name!r}: can't be used with {arguments} here ({error})"
        ) from error
    if any(jnp.issubdtype(leaf.dtype, jax.dtypes.prng_key) for leaf in jax.tree.leaves(state)):
        raise InputError(
            f"optim.name={config.name!r}: its state holds a random key, which no checkpoint "
            "keeps; take an optimizer without one"
        )


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
    if config.no_decay and "mask" not in parameters:
        raise InputError(
            f"optim.no_decay: optax.{config.name} has no mask of what it decays; leave the key out"
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
