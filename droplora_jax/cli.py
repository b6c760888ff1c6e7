"""The command line: dispatch to what does the work."""

from __future__ import annotations

import argparse
import os
import sys
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import NoReturn

from droplora_jax.commands.parser import command_line
from droplora_jax.core import signals
from droplora_jax.core.compile_cache import compile_cache
from droplora_jax.core.errors import InputError

DONE, BAD_INPUT, NON_FINITE, INTERRUPTED, TERMINATED = 0, 2, 3, 130, 143


def main(arguments: Sequence[str] | None = None) -> int:
    """Run one command; returns its exit code.

    0 done, 2 bad input, 3 non-finite loss, 130 interrupted and 143 preempted (both saved). One of
    several processes that has lost another one is aborted by JAX: 134.
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
            return options.command(options)
    except InputError as error:
        return _fail(error, BAD_INPUT)
    except OSError as error:
        where = f"{error.filename}: " if error.filename else ""
        return _fail(f"{where}{error.strerror or error}", BAD_INPUT)
    except KeyboardInterrupt:
        return _fail("interrupted", INTERRUPTED)
    except signals.Terminated:
        return _fail("terminated", TERMINATED)


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


def _fail(message: object, code: int) -> int:
    from droplora_jax.core import distributed

    who = f"{distributed.name()}: " if distributed.several() else ""
    print(f"droplora: {who}{message}", file=sys.stderr, flush=True)
    return code


# Each command imports what it needs, so that `--help` and a mistyped option answer at once.


@compile_cache()
def _quickstart(options: argparse.Namespace) -> int:
    from droplora_jax.commands.quickstart import quickstart

    return _training(lambda console: quickstart(Path(options.output), console))


@compile_cache()
def _train(options: argparse.Namespace) -> int:
    from droplora_jax.core import distributed
    from droplora_jax.runs import config_reader
    from droplora_jax.runs.train_run import dry_run, train_run

    config = config_reader.read(options.file, options.overrides)
    distributed.join(config.distributed)
    work = dry_run if options.dry_run else train_run
    return _training(lambda console: work(config, console))


def _training(work) -> int:
    from rich.console import Console

    from droplora_jax.core import distributed
    from droplora_jax.training.loop import NonFinite, Stopped

    try:
        work(Console(quiet=not distributed.first()))
    except NonFinite as error:
        return _fail(error, NON_FINITE)
    except Stopped as error:
        return _fail(error, error.exit_code)
    return DONE


@compile_cache()
def _export(options: argparse.Namespace) -> int:
    from rich.console import Console

    from droplora_jax.commands.export import export_folder

    export_folder(
        options.folders,
        options.to,
        format=options.format,
        step=options.step,
        dtype=options.dtype,
        rank=options.rank,
        base=options.base,
        console=Console(),
    )
    return DONE


@compile_cache()
def _generate(options: argparse.Namespace) -> int:
    if (options.prompts is None) != (options.output is None):
        raise InputError("--prompts and --output go together; without both, it is a chat")
    from rich.console import Console

    from droplora_jax.commands.chat import chat
    from droplora_jax.commands.generate import Request, generate_file
    from droplora_jax.inference.generator import Sampling

    request = Request(
        model=options.model,
        adapter=tuple(options.adapter),
        step=options.step,
        dtype=options.dtype,
        quantize=options.quantize,
        template=options.template,
        sampling=Sampling(
            max_new_tokens=options.max_new_tokens,
            temperature=options.temperature,
            top_k=options.top_k,
            top_p=options.top_p,
            stop=tuple(options.stop),
            seed=options.seed,
        ),
        batch_size=options.batch_size,
    )
    if options.prompts is None:
        chat(request, Console())
    else:
        generate_file(request, options.prompts, options.output, Console())
    return DONE


@compile_cache()
def _evaluate(options: argparse.Namespace) -> int:
    from rich.console import Console

    from droplora_jax.commands.evaluate import EvaluateConfig, evaluate_files

    config = EvaluateConfig(
        model=options.model,
        tasks=tuple(options.task),
        adapter=tuple(options.adapter),
        step=options.step,
        dtype=options.dtype,
        quantize=options.quantize,
        limit=options.limit,
        batch_size=options.batch_size,
        max_new_tokens=options.max_new_tokens,
        run_code=options.run_code,
    )
    evaluate_files(config, options.output, Console())
    return DONE


def _plan(options: argparse.Namespace) -> int:
    import jax
    from rich.console import Console

    jax.config.update("jax_platforms", "cpu")  # the compiler alone is asked
    from droplora_jax.commands.plan import show_plan

    show_plan(
        options.file,
        options.overrides,
        where=options.topology,
        as_json=options.json,
        console=Console(),
    )
    return DONE


def _inspect(options: argparse.Namespace) -> int:
    from rich.console import Console

    from droplora_jax.commands.inspect import inspect

    inspect(options.folder, as_json=options.json, picture=options.png, console=Console())
    return DONE


COMMANDS: dict[str, Callable[[argparse.Namespace], int]] = {
    "quickstart": _quickstart,
    "train": _train,
    "export": _export,
    "generate": _generate,
    "evaluate": _evaluate,
    "plan": _plan,
    "inspect": _inspect,
}

if __name__ == "__main__":
    command()
