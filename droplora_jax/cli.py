"""The command line: parse and dispatch."""

from __future__ import annotations

import argparse
import os
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import NoReturn

from droplora_jax import signals
from droplora_jax.compile_cache import compile_cache
from droplora_jax.errors import InputError

DONE, BAD_INPUT, NON_FINITE, INTERRUPTED, TERMINATED = 0, 2, 3, 130, 143


def main(arguments: Sequence[str] | None = None) -> int:
    """Run one command; returns its exit code.

    0 done, 2 bad input, 3 non-finite loss, 130 interrupted and 143 preempted (both saved). One of
    several processes that has lost another one is aborted by JAX: 134.
    """
    parser = _parser()
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
        from droplora_jax import processes

        processes.leave()
    sys.stdout.flush()
    sys.stderr.flush()
    if code != DONE:
        # JAX's threads may be at work still, on memory that an orderly exit takes from them.
        os._exit(code)
    sys.exit(code)


def _fail(message: object, code: int) -> int:
    from droplora_jax import processes

    who = f"{processes.name()}: " if processes.several() else ""
    print(f"droplora: {who}{message}", file=sys.stderr, flush=True)
    return code


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        prog="droplora", description="Fine-tune LLaMA-family models with DropLoRA in JAX."
    )
    commands = parser.add_subparsers(required=True, metavar="COMMAND")

    _quickstart_arguments(
        commands.add_parser(
            "quickstart", help="train, export and check a small model, with no input and no network"
        )
    )
    _train_arguments(
        commands.add_parser(
            "train", help="train what a YAML describes; carries on if its output holds a checkpoint"
        )
    )
    _export_arguments(
        commands.add_parser(
            "export", help="write what a run trained, or a PEFT adapter, for other tools"
        )
    )
    _generate_arguments(
        commands.add_parser(
            "generate", help="complete the prompts of a file, or chat in the terminal without one"
        )
    )
    _evaluate_arguments(
        commands.add_parser(
            "evaluate", help="score a model on test sets; carries on where it was interrupted"
        )
    )
    _plan_arguments(
        commands.add_parser(
            "plan",
            help="say whether a run fits on devices that are not here, and how fast it could be",
        )
    )
    _inspect_arguments(
        commands.add_parser(
            "inspect", help="say what a folder is, and what an adapter does to each layer"
        )
    )
    return parser


def _quickstart_arguments(quickstart: argparse.ArgumentParser) -> None:
    quickstart.add_argument("--output", default="droplora-quickstart", metavar="DIR")
    quickstart.set_defaults(command=_quickstart)


def _train_arguments(train: argparse.ArgumentParser) -> None:
    add = train.add_argument
    add("file", metavar="RUN.yaml")
    add("overrides", nargs="*", metavar="section.key=value")
    add("--dry-run", action="store_true", help="show the data and stop; no run begins")
    train.set_defaults(command=_train)


def _export_arguments(export: argparse.ArgumentParser) -> None:
    add = export.add_argument
    add("folder", metavar="RUN_DIR|ADAPTER_DIR", type=Path)
    add("--to", required=True, metavar="DIR", type=Path)
    add("--format", required=True, choices=("merged", "peft"))
    add("--dtype", choices=("bfloat16", "float32"), help="default: the base's")
    add("--step", default="last", metavar="last|best|N", help="of a run")
    add("--rank", type=int, metavar="K", help="truncate the adapter to this rank")
    add("--base", metavar="DIR", help="of an adapter, if it has moved")
    export.set_defaults(command=_export)


def _plan_arguments(plan: argparse.ArgumentParser) -> None:
    add = plan.add_argument
    add("file", metavar="RUN.yaml", type=Path)
    add("overrides", nargs="*", metavar="section.key=value")
    where = "v5e:4x4, 2xv5e:16x16, cpu:8, ..."
    add("--topology", required=True, metavar="KIND:SHAPE", help=where)
    add("--json", action="store_true", help="everything, for programs")
    plan.set_defaults(command=_plan)


def _inspect_arguments(inspect: argparse.ArgumentParser) -> None:
    add = inspect.add_argument
    add("folder", metavar="DIR", type=Path)
    add("--json", action="store_true", help="everything, for programs")
    add("--png", metavar="FILE", type=Path, help="draw a map of the layers")
    inspect.set_defaults(command=_inspect)


def _generate_arguments(generate: argparse.ArgumentParser) -> None:
    add = generate.add_argument
    add("model", metavar="MODEL", help="a model's folder or hub id, a run, or an adapter")
    add("--adapter", metavar="DIR", help="in PEFT's format, for a base")
    add("--step", default="last", metavar="last|best|N", help="of a run")
    add("--prompts", metavar="FILE", type=Path, help='rows {"prompt": ...}, .jsonl or .json')
    add("--output", metavar="FILE.jsonl", type=Path, help="what to write; carries on if cut short")
    add("--template", metavar="NAME|recorded", help="around every prompt; default: none in a file")
    add("--max-new-tokens", type=int, default=256, metavar="N")
    add("--temperature", type=float, default=0.0, metavar="T", help="default: 0, greedy")
    add("--top-k", type=int, metavar="K")
    add("--top-p", type=float, metavar="P")
    add("--stop", nargs="+", action="extend", default=[], metavar="TEXT", help="ends a completion")
    add("--seed", type=int, default=0)
    add("--batch-size", type=int, default=8, metavar="N", help="prompts at a time")
    add("--dtype", choices=("auto", "bfloat16", "float32"), default="auto")
    add("--quantize", choices=("none", "int8", "int4", "nf4"), help="default: as a run was trained")
    generate.set_defaults(command=_generate)


def _evaluate_arguments(evaluate: argparse.ArgumentParser) -> None:
    add = evaluate.add_argument
    add("model", metavar="MODEL", help="a model's folder or hub id, a run, or an adapter")
    add("--adapter", metavar="DIR", help="in PEFT's format, for a base")
    add("--step", default="last", metavar="last|best|N", help="of a run")
    add("--task", required=True, action="append", metavar="NAME=FILE", help="as often as you like")
    add("--output", required=True, metavar="FILE.json", type=Path)
    add("--limit", type=int, metavar="N", help="the first N examples of every file")
    add("--max-new-tokens", type=int, metavar="N", help="default: what each task needs")
    add("--run-code", action="store_true", help="let humaneval and mbpp run what the model writes")
    add("--batch-size", type=int, default=8, metavar="N", help="prompts at a time")
    add("--dtype", choices=("auto", "bfloat16", "float32"), default="auto")
    add("--quantize", choices=("none", "int8", "int4", "nf4"), help="default: as a run was trained")
    evaluate.set_defaults(command=_evaluate)


# Each command imports what it needs, so that `--help` and a mistyped option answer at once.


@compile_cache()
def _quickstart(options: argparse.Namespace) -> int:
    from droplora_jax.quickstart import quickstart

    return _training(lambda console: quickstart(Path(options.output), console))


@compile_cache()
def _train(options: argparse.Namespace) -> int:
    from droplora_jax import processes, run
    from droplora_jax.launch import dry_run, train_run

    config = run.read(options.file, options.overrides)
    processes.join(config.distributed)
    work = dry_run if options.dry_run else train_run
    return _training(lambda console: work(config, console))


def _training(work) -> int:
    from rich.console import Console

    from droplora_jax import processes
    from droplora_jax.train import NonFinite, Stopped

    try:
        work(Console(quiet=not processes.first()))
    except NonFinite as error:
        return _fail(error, NON_FINITE)
    except Stopped as error:
        return _fail(error, error.exit_code)
    return DONE


@compile_cache()
def _export(options: argparse.Namespace) -> int:
    from rich.console import Console

    from droplora_jax.exporting import export_folder

    export_folder(
        options.folder,
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

    from droplora_jax.chatting import chat
    from droplora_jax.generate import Sampling
    from droplora_jax.generating import Request, generate_file

    request = Request(
        model=options.model,
        adapter=options.adapter,
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

    from droplora_jax.evaluating import EvaluateConfig, evaluate_files

    config = EvaluateConfig(
        model=options.model,
        tasks=tuple(options.task),
        adapter=options.adapter,
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
    from droplora_jax.planning import show_plan

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

    from droplora_jax.inspection import inspect

    inspect(options.folder, as_json=options.json, picture=options.png, console=Console())
    return DONE


if __name__ == "__main__":
    command()
