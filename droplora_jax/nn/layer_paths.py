"""Which layers a configuration means: regular expressions searched in the layers' names.

The name of a layer is its dotted path, such as `layers.q_proj`. A layer of a stack has a second
name, with its index before the last part: `layers.3.q_proj`.
"""

from __future__ import annotations

import itertools
import re
from collections.abc import Mapping, Sequence
from typing import Any, TypeVar

from droplora_jax.core.errors import InputError

Path = tuple[Any, ...]  # attribute names and list indices
Value = TypeVar("Value")

# `paper`: the layers adapted for the published numbers; attention's output and the gate are not.
# `all-linear`: all but embedding and head, as in PEFT.
NAMED_TARGETS = {
    "paper": r"(^|\.)(q|k|v|up|down)_proj$",
    "all-linear": r"^(?!(embed|lm_head)$)",
}


class Patterns(dict[str, Value]):
    """Values by pattern; the first pattern that matches counts. Hashable, for configurations."""

    def __hash__(self) -> int:  # type: ignore[override]
        return hash(tuple(self.items()))

    def of(self, names: Sequence[str], default: Value) -> Value:
        """The value for a layer that has these names."""
        return next((v for pattern, v in self.items() if matches(pattern, names)), default)


def dotted(path: Path) -> str:
    return ".".join(map(str, path))


def layer_names(path: Path, stack: tuple[int, ...]) -> list[tuple[str, ...]]:
    """The names of every layer at a path, in the order of the stack."""
    name = dotted(path)
    if not stack:
        return [(name,)]
    indices = itertools.product(*map(range, stack))
    return [(name, dotted((*path[:-1], *index, *path[-1:]))) for index in indices]


def matches(pattern: str, names: Sequence[str]) -> bool:
    """Whether a pattern, or the one that a name of `NAMED_TARGETS` stands for, occurs in a name."""
    return any(re.search(NAMED_TARGETS.get(pattern, pattern), name) for name in names)


def select(
    stacks: Mapping[Path, tuple[int, ...]], targets: Sequence[str], exclude: Sequence[str] = ()
) -> dict[Path, tuple[bool, ...]]:
    """For each path with a target: which layers of its stack are targets.

    Args:
      stacks: the linear layers of the model, each with the leading axes of its stack.

    Raises:
      InputError: not a regular expression, or a pattern that matches nothing (lists the layers).
    """
    names = {path: layer_names(path, stack) for path, stack in stacks.items()}
    check_patterns({"targets": targets, "exclude": exclude}, names)
    chosen = {
        path: tuple(
            any(matches(pattern, layer) for pattern in targets)
            and not any(matches(pattern, layer) for pattern in exclude)
            for layer in layers
        )
        for path, layers in names.items()
    }
    return {path: layers for path, layers in chosen.items() if any(layers)}


def check_patterns(
    patterns: Mapping[str, Sequence[str]],
    names: Mapping[Path, Sequence[tuple[str, ...]]],
) -> None:
    """Raise InputError unless each pattern of the options is one, and matches something."""
    for option, given in patterns.items():
        for pattern in given:
            where = f"{option}={pattern!r}"
            try:
                re.compile(pattern)
            except re.error as error:
                raise InputError(f"{where}: not a regular expression ({error})") from error
            if not any(matches(pattern, layer) for layers in names.values() for layer in layers):
                known = [dotted(path) for path in names]
                shown = ", ".join(known[:20]) + (", ..." if len(known) > 20 else "")
                raise InputError(
                    f"{where} matches no module; linear modules are {shown or 'none'} "
                    f"({len(known)} in all)"
                )
