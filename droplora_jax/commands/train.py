"""`droplora train`: a run from its YAML; and how a run that ends early ends the command."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import TYPE_CHECKING

from droplora_jax.commands.exit_codes import DONE, NON_FINITE, fail
from droplora_jax.commands.parser import option
from droplora_jax.core.compile_cache import compile_cache

if TYPE_CHECKING:
    from rich.console import Console


@dataclass(frozen=True, kw_only=True)
class Train:
    """Train what a YAML describes; carries on if its output holds a checkpoint."""

    file: str = option("RUN.yaml")
    overrides: tuple[str, ...] = option("section.key=value", nargs="*")
    dry_run: bool = option(help="show the data and stop; no run begins", default=False)

    def run(self) -> int:
        from droplora_jax.runs import config_reader

        config = config_reader.read(self.file, self.overrides)

        from droplora_jax.core import distributed
        from droplora_jax.runs.train_run import dry_run, train_run

        with compile_cache():
            distributed.join(config.distributed)
            work = dry_run if self.dry_run else train_run
            return exit_code(lambda console: work(config, console))


def exit_code(train: Callable[[Console], object]) -> int:
    """Train, on the first process's console; returns how it ended."""
    from rich.console import Console

    from droplora_jax.core import distributed
    from droplora_jax.training.loop import NonFinite, Stopped

    try:
        train(Console(quiet=not distributed.first()))
    except NonFinite as error:
        return fail(error, NON_FINITE)
    except Stopped as error:
        return fail(error, error.exit_code)
    return DONE
