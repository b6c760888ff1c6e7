"""The commands by name: a new one is one file and one line here.

A command is a dataclass whose fields are its arguments (see `parser.py`). Its module imports what
does the work when it runs, so that help and mistyped options are answered at once.
"""

from droplora_jax.commands.evaluate import Evaluate
from droplora_jax.commands.export import Export
from droplora_jax.commands.generate import Generate
from droplora_jax.commands.inspect import Inspect
from droplora_jax.commands.parser import Command
from droplora_jax.commands.plan import Plan
from droplora_jax.commands.quickstart import Quickstart
from droplora_jax.commands.train import Train

COMMANDS: dict[str, type[Command]] = {
    "quickstart": Quickstart,
    "train": Train,
    "export": Export,
    "generate": Generate,
    "evaluate": Evaluate,
    "plan": Plan,
    "inspect": Inspect,
}
