"""What a run reads, and how it is written out for the model."""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field, replace
from os import PathLike, fspath
from typing import Any, Literal

from droplora_jax.core.errors import InputError, did_you_mean, raise_all
from droplora_jax.data.columns import column_problems
from droplora_jax.data.formats import FORMATS
from droplora_jax.data.templates import TEMPLATES
from droplora_jax.data.templates.base import TRAIN_ON

AUTO = "auto"
TOO_LONG = ("cut", "drop", "error")
EMPTY = ("drop", "error")


@dataclass(frozen=True)
class Part:
    """One source of several.

    Attributes:
      path: a file, a folder, a glob, a URL of any of them, or `hf://OWNER/NAME?split=...`.
      weight: its share of the lines, in proportion to the others'; with one, all have one.
      format, columns, template: its own, if they are not the run's.
    """

    path: str
    weight: float | None = None
    format: str | None = None
    columns: Mapping[str, str] | None = None
    template: str | None = None

    def settings(self, config: DataConfig) -> DataConfig:
        """The run's, for this source alone.

        Raises:
          InputError: its own are not possible.
        """
        if not self.options:
            return config
        alone: dict[str, Any] = {"train": self.path, "valid": None, "valid_fraction": None}
        try:
            return replace(config, **alone, **self.options)
        except InputError as error:
            raise InputError(*(f"{self.path}: {problem}" for problem in error.problems)) from error

    @property
    def options(self) -> dict[str, Any]:
        """Those of its options that are its own."""
        options = {"format": self.format, "columns": self.columns, "template": self.template}
        return {name: value for name, value in options.items() if value is not None}


Place = str | PathLike[str] | Part


def parts_of(places: Place | Sequence[Place]) -> tuple[Part, ...]:
    """What `data.train` or `data.valid` names, written out."""
    several = (places,) if isinstance(places, str | PathLike | Part) else places
    return tuple(p if isinstance(p, Part) else Part(fspath(p)) for p in several)


@dataclass(frozen=True)
class DataConfig:
    """The data of a run.

    Attributes:
      train: a source or several, each a `Part` or its path. Several are one after the other, or,
        with weights, mixed.
      valid: the same, without weights, for evaluation while training.
      valid_fraction: instead of `valid`, the part of the training rows that is held out.
      format: a name in `FORMATS`, or `auto`: by the keys of each file's first row.
      columns: for files of other names: the format's keys, and the columns that hold them.
      template: a name in `TEMPLATES`, or `auto`: the usual one of the format.
      max_length: tokens of a line; a row is never longer.
      too_long: what happens to a row of more tokens: `cut` keeps the first `max_length`, `drop`
        leaves the row out, `error` stops. Plain text is split instead, and nothing of it is lost.
      empty: what happens to a row whose text is empty: `drop` leaves it out, `error` stops.
      train_on: `responses` (every turn of the assistant and its end marker), `last` (the last of
        them alone), or `all` (the prompt too).
      packing: put several rows into a line: `first_fit` (or true) in the order of a shuffle,
        `best_fit` from long rows to short ones, which fills lines better.
      cache: a folder for tokenised rows; by default one in the user's cache.
    """

    train: str | tuple[str | Part, ...]
    valid: str | tuple[str | Part, ...] | None = None
    valid_fraction: float | None = None
    format: str = AUTO
    columns: Mapping[str, str] = field(default_factory=dict)
    template: str = AUTO
    max_length: int = 1024
    too_long: str = "cut"
    empty: str = "drop"
    train_on: str = "responses"
    packing: bool | Literal["first_fit", "best_fit"] = False
    cache: str | None = None

    def __post_init__(self) -> None:
        raise_all(self._problems())

    def _problems(self) -> Iterator[str]:
        for name in ("train", "valid"):
            if (value := getattr(self, name)) is not None:
                yield from self._source_problems(name, value)
        fraction = self.valid_fraction
        if fraction is not None and not 0 < fraction < 1:
            yield f"valid_fraction={fraction}: must be above 0 and below 1"
        if fraction is not None and self.valid is not None:
            yield "valid and valid_fraction are both given: give one of them"
        if self.max_length < 2:
            yield (
                f"max_length={self.max_length}: must be at least 2, since a token is predicted "
                "from those before it"
            )
        yield from _rendering_problems(self.format, self.columns, self.template)
        yield from _choice_problems("too_long", self.too_long, TOO_LONG)
        yield from _choice_problems("empty", self.empty, EMPTY)
        yield from _choice_problems("train_on", self.train_on, TRAIN_ON)

    def _source_problems(self, name: str, value: str | tuple[str | Part, ...]) -> Iterator[str]:
        parts = parts_of(value)
        if not parts or not all(part.path for part in parts):
            yield f"{name}={value!r}: must be a file or a list of files"
        weights = [part.weight for part in parts]
        if any(w is not None and not (w > 0 and math.isfinite(w)) for w in weights):
            yield f"{name}: the weights {weights} must be positive"
        elif any(weights) and name == "valid":
            yield "valid takes no weights: every example is evaluated once"
        elif any(weights) and None in weights:
            without = parts[weights.index(None)].path
            yield f"{name}: {without} has no weight, and others have: give it one"
        for part in parts:
            options = {
                "format": self.format,
                "columns": self.columns,
                "template": self.template,
                **part.options,
            }
            problems = _rendering_problems(**options) if part.options else ()
            yield from (f"{name}: {part.path}: {problem}" for problem in problems)

    @property
    def weights(self) -> tuple[float, ...] | None:
        """Of the sources of `train`, if they are mixed."""
        weights = tuple(part.weight for part in parts_of(self.train))
        return None if None in weights else weights  # type: ignore[return-value]

    @property
    def fit(self) -> Literal["first_fit", "best_fit"] | None:
        """How rows are put into lines; None for a line each."""
        return "first_fit" if self.packing is True else self.packing or None

    @property
    def packed(self) -> bool:
        """Whether a line may hold several rows."""
        return self.fit is not None


def _rendering_problems(format: str, columns: Mapping[str, str], template: str) -> Iterator[str]:
    """What is wrong with how records are read and written out."""
    unknown = tuple(_choice_problems("format", format, (AUTO, *FORMATS)))
    yield from unknown
    yield from _choice_problems("template", template, (AUTO, *TEMPLATES))
    if not unknown:
        yield from column_problems(columns, None if format == AUTO else format)


def _choice_problems(name: str, value: str, choices: Sequence[str]) -> Iterator[str]:
    if value not in choices:
        hint = did_you_mean(value, choices)
        must = f"{name}={value!r}: must be one of {', '.join(choices)}"
        yield f"{must}; {hint}" if hint else must
