"""`droplora inspect`: what a folder is, and what an adapter in it does to each layer."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

from droplora_jax.commands.options import ignored_keys, said_on_command_line
from droplora_jax.commands.parser import option


@dataclass(frozen=True, kw_only=True)
class Inspect:
    """Say what a folder is, and what an adapter does to each layer."""

    folder: Path = option("DIR")
    json: bool = option(help="everything, for programs", default=False)
    ignore_config_keys: tuple[str, ...] = ignored_keys()
    png: Path | None = option("FILE", "draw a map of the layers", default=None)

    def run(self) -> None:
        from rich.console import Console

        from droplora_jax.commands.inspect_report import show

        with said_on_command_line():
            show(
                self.folder,
                as_json=self.json,
                picture=self.png,
                console=Console(),
                ignore_config_keys=self.ignore_config_keys,
            )
