"""`droplora export`: from the folder of a run, or of adapters, to a folder for other tools."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Literal

from droplora_jax.commands.options import ignored_keys, said_on_command_line
from droplora_jax.commands.parser import option
from droplora_jax.core.compile_cache import compile_cache
from droplora_jax.core.errors import InputError
from droplora_jax.core.files import check_free
from droplora_jax.hf import EXPORTERS


@dataclass(frozen=True, kw_only=True)
class Export:
    """Write what a run trained, or a PEFT adapter, for other tools.

    Attributes:
      folders: of one run; or of adapters, DIR or DIR=WEIGHT, whose sum it is.
      dtype: of a merged folder.
    """

    folders: tuple[str, ...] = option(
        "RUN_DIR|ADAPTER_DIR[=WEIGHT]", "several: their sum", nargs="+"
    )
    to: Path = option("DIR", required=True)
    format: str = option(choices=tuple(EXPORTERS), required=True)
    dtype: Literal["bfloat16", "float32"] | None = option(help="default: the base's", default=None)
    step: str = option("last|best|N", "of a run", default="last")
    rank: int | None = option("K", "truncate the adapter to this rank", default=None)
    base: str | None = option("DIR", "of an adapter, if it has moved", default=None)
    ignore_config_keys: tuple[str, ...] = ignored_keys()

    def run(self) -> None:
        check_free(self.to)
        if self.dtype is not None and self.format != "merged":
            raise InputError(
                f"--dtype {self.dtype}: only for --format merged; adapters are float32"
            )
        with compile_cache():
            self._write()

    def _write(self) -> None:
        from rich.console import Console

        from droplora_jax.adapters.truncate import truncated
        from droplora_jax.commands.export_model import exported_model, source_notes
        from droplora_jax.core.console import say
        from droplora_jax.hf.exporter import exporter

        console = Console()
        for note in source_notes(self.folders):
            say(console, note)
        with said_on_command_line():
            model, record = exported_model(
                self.folders,
                step=self.step,
                base=self.base,
                ignore_config_keys=self.ignore_config_keys,
            )
        if self.rank is not None:
            model, truncation = truncated(model, self.rank)
            say(console, str(truncation))
        write = exporter(self.format)
        say(console, write(model, self.to, dtype=self.dtype, record=record))
