"""How commands end."""

from __future__ import annotations

import sys

DONE, BAD_INPUT, NON_FINITE, INTERRUPTED, TERMINATED = 0, 2, 3, 130, 143


def fail(message: object, code: int) -> int:
    """Print why the command ends, and on which of several processes; returns the code."""
    who = ""
    if "jax" in sys.modules:  # before that there is one process
        from droplora_jax.core import distributed

        who = f"{distributed.name()}: " if distributed.several() else ""
    print(f"droplora: {who}{message}", file=sys.stderr, flush=True)
    return code
