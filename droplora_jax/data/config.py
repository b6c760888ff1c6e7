"""What a run reads, and how it is written out for the model."""

from __future__ import annotations

import difflib
import math
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from os import PathLike, fspath
from typing import Any, Literal

from droplora_jax.core.errors import InputError
from droplora_jax.data.columns import check_columns
from droplora_jax.data.formats import FORMATS
from droplora_jax.data.templates import TEMPLATES, TRAIN_ON

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
        own = {"format": self.format, "columns": self.columns, "template": self.template}
        given: dict[str, Any] = {name: value for name, value in own.items() if value is not None}
        if not given:
            return config
        try:
            return replace(config, train=self.path, valid=None, valid_fraction=None, **given)
        except InputError as error:
            raise InputError(f"{self.path}: {error}") from error


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
        for name in ("train", "valid"):
            if (value := getattr(self, name)) is not None:
                self._check_parts(name, value)
        self._check_held_out()
        if self.max_length < 2:
            raise InputError(
                f"data.max_length={self.max_length}: must be at least 2, since a token is "
                "predicted from those before it"
            )
        _check_choice("format", self.format, (AUTO, *FORMATS))
        _check_choice("template", self.template, (AUTO, *TEMPLATES))
        _check_choice("too_long", self.too_long, TOO_LONG)
        _check_choice("empty", self.empty, EMPTY)
        _check_choice("train_on", self.train_on, TRAIN_ON)
        check_columns(self.columns, None if self.format == AUTO else self.format)

    def _check_parts(self, name: str, value: str | tuple[str | Part, ...]) -> None:
        parts = parts_of(value)
        if not parts or not all(part.path for part in parts):
            raise InputError(f"data.{name}={value!r}: must be a file or a list of files")
        weights = [part.weight for part in parts]
        if any(w is not None and not (w > 0 and math.isfinite(w)) for w in weights):
            raise InputError(f"data.{name}: the weights {weights} must be positive")
        if any(weights) and name == "valid":
            raise InputError("data.valid takes no weights: every row is evaluated once")
        if any(weights) and None in weights:
            without = parts[weights.index(None)].path
            raise InputError(f"data.{name}: {without} has no weight, and others have: give it one")
        for part in parts:
            part.settings(self)

    def _check_held_out(self) -> None:
        fraction = self.valid_fraction
        if fraction is not None and not 0 < fraction < 1:
            raise InputError(f"data.valid_fraction={fraction}: must be above 0 and below 1")
        if fraction is not None and self.valid is not None:
            raise InputError("data.valid and data.valid_fraction are both given: give one of them")

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


def _check_choice(name: str, value: str, choices: Iterable[str]) -> None:
    choices = tuple(choices)
    if value in choices:
        return
    near = difflib.get_close_matches(str(value), choices, n=1)
    hint = f"; did you mean {near[0]}?" if near else ""
    raise InputError(f"data.{name}={value!r}: must be one of {', '.join(choices)}{hint}")
