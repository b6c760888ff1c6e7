"""`droplora plan`: what the step of a run takes on devices that need not be here."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

from droplora_jax.commands.parser import option


@dataclass(frozen=True, kw_only=True)
class Plan:
    """Say whether a run fits on devices that are not here, and how fast it could be."""

    file: Path = option("RUN.yaml")
    overrides: tuple[str, ...] = option("section.key=value", nargs="*")
    topology: str = option("KIND:SHAPE", "v5e:4x4, 2xv5e:16x16, cpu:8, ...", required=True)
    json: bool = option(help="everything, for programs", default=False)

    def run(self) -> None:
        import jax
        from rich.console import Console

        jax.config.update("jax_platforms", "cpu")  # the compiler alone is asked
        from droplora_jax.commands.plan_tables import show_plan

        show_plan(
            self.file, self.overrides, where=self.topology, as_json=self.json, console=Console()
        )
