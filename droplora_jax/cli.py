"""The command line: which command is meant, and how it ends."""

from __future__ import annotations

import os
import sys
from collections.abc import Sequence
from typing import NoReturn

from droplora_jax.commands import COMMANDS
from droplora_jax.commands.exit_codes import BAD_INPUT, DONE, INTERRUPTED, TERMINATED, fail
from droplora_jax.commands.parser import build, command_line
from droplora_jax.core import signals
from droplora_jax.core.errors import InputError


def main(arguments: Sequence[str] | None = None) -> int:
    """Run one command; returns its exit code.

    0 done, 2 bad input, 3 non-finite loss, 130 interrupted, 143 terminated (`train` saves before
    both). JAX aborts a process that has lost another one of its run: 134.
    """
    parser = command_line(COMMANDS)
    options, rest = parser.parse_known_args(arguments)
    # Overrides may stand behind the options too.
    if any(word.startswith("-") or not hasattr(options, "overrides") for word in rest):
        parser.error(f"unrecognized arguments: {' '.join(rest)}")
    if rest:
        options.overrides += rest
    try:
        with signals.raised():
            return build(options.command, vars(options)).run() or DONE
    except InputError as error:
        return fail(error, BAD_INPUT)
    except OSError as error:
        where = f"{error.filename}: " if error.filename else ""
        return fail(f"{where}{error.strerror or error}", BAD_INPUT)
    except KeyboardInterrupt:
        return fail("interrupted", INTERRUPTED)
    except signals.Terminated:
        return fail("terminated", TERMINATED)


def command() -> NoReturn:
    """`main` as a program."""
    code = main()
    if "jax" in sys.modules:
        from droplora_jax.core import distributed

        distributed.leave()
    sys.stdout.flush()
    sys.stderr.flush()
    if code != DONE:
        # JAX's threads may be at work still, on memory that an orderly exit takes from them.
        os._exit(code)
    sys.exit(code)


if __name__ == "__main__":
    command()
