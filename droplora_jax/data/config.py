"""The options of a run's data; neither JAX nor transformers is imported here."""

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
BAD_ROWS = ("error", "drop")


@dataclass(frozen=True)
class Part:
    """One source of several.

    Attributes:
      path: a file, a folder, a glob, a URL of any of them, or `hf://OWNER/NAME?split=...`.
      weight: its share of the sequences, in proportion to the other weights; either all sources
        have a weight or none has.
      format, columns, template: options of this source, instead of the run's.
    """

    path: str
    weight: float | None = None
    format: str | None = None
    columns: Mapping[str, str] | None = None
    template: str | None = None

    def settings(self, config: DataConfig) -> DataConfig:
        """The run's options with those of this source in their place.

        Raises:
          InputError: an option of this source has no such value.
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
        """The options that this source has in place of the run's."""
        options = {"format": self.format, "columns": self.columns, "template": self.template}
        return {name: value for name, value in options.items() if value is not None}


Place = str | PathLike[str] | Part


def parts_of(places: Place | Sequence[Place]) -> tuple[Part, ...]:
    """The sources of a value of `train` or `valid`, each as a `Part`."""
    listed = (places,) if isinstance(places, str | PathLike | Part) else places
    return tuple(p if isinstance(p, Part) else Part(fspath(p)) for p in listed)


@dataclass(frozen=True)
class DataConfig:
    """The data of a run.

    Attributes:
      train: a source or several, each a `Part` or its path. Several are read one after the other,
        or mixed if they have weights.
      valid: the same, without weights, for evaluation while training.
      valid_fraction: instead of `valid`, the fraction of the training examples to hold out.
      format: a name in `FORMATS`, or `auto`: by the keys of each file's first record.
      columns: for files with other names: from the format's keys to the columns that hold them.
      template: a name in `TEMPLATES`, or `auto`: the default of the format.
      max_length: tokens of a sequence; no example is longer.
      too_long: what happens to an example of more tokens: `cut` keeps the first `max_length`,
        `drop` leaves it out, `error` stops. Plain text is split instead, and nothing of it is lost.
      empty: what happens to an example whose text is empty: `drop` leaves it out, `error` stops.
      bad_rows: what happens to a row that is not as its format, its template or the kind of file
        needs it: `error` stops and lists such rows, `drop` leaves them out and reports them.
      ignore_keys: keys of rows and of their messages that are passed over, such as keys which have
        a meaning elsewhere and are refused here.
      train_on: `responses` (every turn of the assistant and its end marker), `last` (only the last
        of them), or `all` (the prompt too).
      packing: put several examples into one sequence: `first_fit` (or true) in shuffled order,
        `best_fit` from long examples to short ones, which fills sequences better.
      cache: a folder for tokenised examples; by default one in the user's cache.
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
    bad_rows: str = "error"
    ignore_keys: tuple[str, ...] = ()
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
        yield from _choice_problems("bad_rows", self.bad_rows, BAD_ROWS)
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
        """The weights of the sources of `train`; None if they are not mixed."""
        weights = tuple(part.weight for part in parts_of(self.train))
        return None if None in weights else weights  # type: ignore[return-value]

    @property
    def fit(self) -> Literal["first_fit", "best_fit"] | None:
        """How examples are packed into sequences; None for one example to a sequence."""
        return "first_fit" if self.packing is True else self.packing or None

    @property
    def packed(self) -> bool:
        """Whether a sequence may hold several examples."""
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
