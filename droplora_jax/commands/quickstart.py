"""`droplora quickstart`: the whole path on a small model that ships with the package."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

from droplora_jax.commands.parser import option
from droplora_jax.core.compile_cache import compile_cache

BASE = Path(__file__).with_name("quickstart_base")  # made by examples/quickstart/make_base.py


@dataclass(frozen=True, kw_only=True)
class Quickstart:
    """Train, export and check a small model, with no input and no network."""

    output: Path = option("DIR", default=Path("droplora-quickstart"))

    def run(self) -> int:
        from droplora_jax.commands.quickstart_run import demonstrate
        from droplora_jax.commands.train import exit_code

        with compile_cache():
            return exit_code(lambda console: demonstrate(BASE, self.output, console))
