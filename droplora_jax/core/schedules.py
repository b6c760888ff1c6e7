"""Schedules of a value over a run: a warm-up from zero, then constant, linear or cosine."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from types import MappingProxyType

import optax

from droplora_jax.core.config import Schedule
from droplora_jax.core.errors import InputError

COURSES: Mapping[str, Callable[[float, int], optax.Schedule]] = MappingProxyType(
    {
        "constant": lambda value, steps: optax.constant_schedule(value),
        "linear": lambda value, steps: optax.linear_schedule(value, 0.0, steps),
        "cosine": lambda value, steps: optax.cosine_decay_schedule(value, steps),
    }
)


def schedule(
    value: float, course: Schedule, warmup_steps: int, steps: int, *, name: str
) -> optax.Schedule:
    """The value at each step of a run of `steps` steps.

    Args:
      name: the name of the option `warmup_steps`, for an error.

    Raises:
      InputError: the warm-up does not end before the run.
    """
    if warmup_steps >= steps:
        raise InputError(
            f"{name}={warmup_steps}: must be below the run's {steps} steps, or the value that it "
            "rises to is never reached; lower it, or train for longer"
        )
    after = COURSES[course](value, steps - warmup_steps)
    if not warmup_steps:
        return after
    warmup = optax.linear_schedule(0.0, value, warmup_steps)
    return optax.join_schedules([warmup, after], [warmup_steps])
