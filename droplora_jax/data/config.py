"""What a run reads, and how it is written out for the model."""

from __future__ import annotations

import difflib
from collections.abc import Iterable
from dataclasses import dataclass

from droplora_jax.data.formats import FORMATS
from droplora_jax.data.templates import TEMPLATES
from droplora_jax.errors import InputError

AUTO = "auto"
TOO_LONG = ("cut", "drop", "error")


@dataclass(frozen=True)
class DataConfig:
    """The data of a run.

    Attributes:
      train: one file or several: .json (a list of objects) or .jsonl (an object a line), .gz of
        either.
      valid: the same, for evaluation while training.
      format: a name in `FORMATS`, or `auto`: by the keys of each file's first row.
      template: a name in `TEMPLATES`, or `auto`: the usual one of the format.
      max_length: tokens of a line; a row is never longer.
      too_long: what happens to a row of more tokens: `cut` keeps the first `max_length`, `drop`
        leaves the row out, `error` stops. Plain text is split instead, and nothing of it is lost.
      packing: put several rows into a line.
    """

    train: str | tuple[str, ...]
    valid: str | tuple[str, ...] | None = None
    format: str = AUTO
    template: str = AUTO
    max_length: int = 1024
    too_long: str = "cut"
    packing: bool = False

    def __post_init__(self) -> None:
        for name in ("train", "valid"):
            value = getattr(self, name)
            if value is not None and (not value or not all(value)):
                raise InputError(f"data.{name}={value!r}: must be a file or a list of files")
        if self.max_length < 2:
            raise InputError(
                f"data.max_length={self.max_length}: must be at least 2, since a token is "
                "predicted from those before it"
            )
        _check_choice("format", self.format, (AUTO, *FORMATS))
        _check_choice("template", self.template, (AUTO, *TEMPLATES))
        _check_choice("too_long", self.too_long, TOO_LONG)


def _check_choice(name: str, value: str, choices: Iterable[str]) -> None:
    choices = tuple(choices)
    if value in choices:
        return
    near = difflib.get_close_matches(str(value), choices, n=1)
    hint = f"; did you mean {near[0]}?" if near else ""
    raise InputError(f"data.{name}={value!r}: must be one of {', '.join(choices)}{hint}")
