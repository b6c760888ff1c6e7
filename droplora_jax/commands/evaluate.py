"""`droplora evaluate`: from a model and test sets to a JSON of scores."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

from droplora_jax.commands.options import ModelRef, TaskOptions
from droplora_jax.commands.parser import group, option
from droplora_jax.core.compile_cache import compile_cache


@dataclass(frozen=True, kw_only=True)
class Evaluate:
    """Score a model on test sets; carries on where it was interrupted.

    Attributes:
      task: NAME=FILE, each.
      output: the JSON to write.
    """

    source: ModelRef = group(ModelRef)
    task: tuple[str, ...] = option("NAME=FILE", "as often as you like", required=True)
    output: Path = option("FILE.json", required=True)
    options: TaskOptions = group(TaskOptions)

    def run(self) -> None:
        from rich.console import Console

        from droplora_jax.commands.evaluate_scores import evaluate_files

        with compile_cache():
            evaluate_files(self.task, self.output, self.source, self.options, Console())
