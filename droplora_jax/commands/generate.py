"""`droplora generate`: the prompts of a file, or a chat in the terminal."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

from droplora_jax.commands.options import ModelRef
from droplora_jax.commands.parser import group, option
from droplora_jax.core.compile_cache import compile_cache
from droplora_jax.core.errors import InputError
from droplora_jax.inference.config import Sampling


@dataclass(frozen=True, kw_only=True)
class Generate:
    """Complete the prompts of a file, or chat in the terminal without one.

    Attributes:
      template: a name in `data.templates.TEMPLATES`, or `recorded`: the one recorded with the
        adapter. By default a file's prompts are taken as they are.
    """

    source: ModelRef = group(ModelRef)
    prompts: Path | None = option("FILE", 'rows {"prompt": ...}, .jsonl or .json', default=None)
    output: Path | None = option(
        "FILE.jsonl", "what to write; carries on if cut short", default=None
    )
    template: str | None = option(
        "NAME|recorded", "around every prompt; default: none in a file", default=None
    )
    sampling: Sampling = group(
        Sampling,
        max_new_tokens={"metavar": "N"},
        temperature={"metavar": "T", "help": "default: 0, greedy"},
        top_k={"metavar": "K"},
        top_p={"metavar": "P"},
        stop={"metavar": "TEXT", "help": "ends a completion", "nargs": "+"},
    )
    batch_size: int = option("N", "prompts at a time", default=8)

    def __post_init__(self) -> None:
        if (self.prompts is None) != (self.output is None):
            raise InputError("--prompts and --output go together; without both, it is a chat")
        if self.batch_size < 1:
            raise InputError(f"--batch-size {self.batch_size}: must be at least 1")

    def run(self) -> None:
        from rich.console import Console

        from droplora_jax.commands.chat import chat
        from droplora_jax.commands.completions import check_template, complete_file

        with compile_cache():
            check_template(self.template)
            if self.prompts is None or self.output is None:
                chat(self.source, self.template, self.sampling, Console())
                return
            complete_file(
                self.prompts,
                self.output,
                self.source,
                self.sampling,
                template=self.template,
                batch_size=self.batch_size,
                console=Console(),
            )
