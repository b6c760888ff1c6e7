"""Groups of options that a command hands on to what does its work."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, Literal

from droplora_jax.commands.parser import option
from droplora_jax.core.errors import InputError
from droplora_jax.nn.options import QuantizedKind

if TYPE_CHECKING:
    from droplora_jax.runs.open_model import ModelFiles, Opened

SUM = "in PEFT's format, for a base; as often as you like, for their sum"


def ignored_keys() -> Any:
    """The flag for keys of a base's `config.json` that are known to change nothing."""
    help = "of config.json, known to change nothing; recorded ones are known"
    return option("KEY", help, nargs="+", default=(), last=True)


@contextmanager
def said_on_command_line() -> Iterator[None]:
    """Name that flag in an error about such keys."""
    from droplora_jax.models.families.config_keys import UnfitConfigKeys

    try:
        yield
    except UnfitConfigKeys as error:
        raise error.said_as(f"--ignore-config-keys {' '.join(error.keys)}") from error


@dataclass(frozen=True, kw_only=True)
class ModelRef:
    """A model, and how it is loaded; see `runs.open_model.open_model`.

    Attributes:
      model: a base, a merged folder, a run or an adapter.
      adapter: for a base, the folders of adapters, DIR or DIR=WEIGHT; the model has their sum.
      step: of a run: `last`, `best`, or the number of a checkpoint.
      ignore_config_keys: keys of `config.json` known to change nothing, besides those recorded.
      dtype: `auto` is bfloat16 on accelerators, float32 on CPU.
      quantize: how the linear layers are stored; default: as the run was trained, else `none`.
    """

    model: str = option("MODEL", "a model's folder or hub id, a run, or an adapter")
    adapter: tuple[str, ...] = option("DIR[=WEIGHT]", SUM, default=())
    step: str = option("last|best|N", "of a run", default="last")
    ignore_config_keys: tuple[str, ...] = ignored_keys()
    dtype: Literal["auto", "bfloat16", "float32"] = option(default="auto", last=True)
    quantize: QuantizedKind | None = option(
        help="default: as a run was trained", default=None, last=True
    )

    def find(self) -> ModelFiles:
        """The files, checked; nothing is loaded."""
        from droplora_jax.runs.open_model import find_model

        with said_on_command_line():
            return find_model(
                self.model,
                self.adapter,
                step=self.step,
                ignore_config_keys=self.ignore_config_keys,
            )

    def load(self, files: ModelFiles) -> Opened:
        """The model that `find` found."""
        return files.load(dtype=self.dtype, quantize=self.quantize)


@dataclass(frozen=True, kw_only=True)
class TaskOptions:
    """How a model is asked the examples of tasks."""

    limit: int | None = option("N", "the first N examples of every file", default=None)
    max_new_tokens: int | None = option("N", "default: what each task needs", default=None)
    run_code: bool = option(help="let humaneval and mbpp run what the model writes", default=False)
    batch_size: int = option("N", "prompts at a time", default=8)

    def __post_init__(self) -> None:
        for name in ("limit", "batch_size", "max_new_tokens"):
            value = getattr(self, name)
            if value is not None and value < 1:
                raise InputError(f"--{name.replace('_', '-')} {value}: must be at least 1")
