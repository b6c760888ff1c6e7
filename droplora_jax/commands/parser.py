"""What the command line takes."""

from __future__ import annotations

import argparse
from collections.abc import Callable, Mapping
from pathlib import Path

ADAPTER = "in PEFT's format, for a base; as often as you like, for their sum"


def command_line(
    work: Mapping[str, Callable[[argparse.Namespace], int]],
) -> argparse.ArgumentParser:
    """A parser whose options have in `command` what does the work of each command."""
    parser = argparse.ArgumentParser(
        prog="droplora", description="Fine-tune LLaMA-family models with DropLoRA in JAX."
    )
    commands = parser.add_subparsers(required=True, metavar="COMMAND")
    for name, (help, arguments) in _COMMANDS.items():
        command = commands.add_parser(name, help=help)
        arguments(command)
        command.set_defaults(command=work[name])
    return parser


def _quickstart_arguments(quickstart: argparse.ArgumentParser) -> None:
    quickstart.add_argument("--output", default="droplora-quickstart", metavar="DIR")


def _train_arguments(train: argparse.ArgumentParser) -> None:
    add = train.add_argument
    add("file", metavar="RUN.yaml")
    add("overrides", nargs="*", metavar="section.key=value")
    add("--dry-run", action="store_true", help="show the data and stop; no run begins")


def _export_arguments(export: argparse.ArgumentParser) -> None:
    add = export.add_argument
    add("folders", metavar="RUN_DIR|ADAPTER_DIR[=WEIGHT]", nargs="+", help="several: their sum")
    add("--to", required=True, metavar="DIR", type=Path)
    add("--format", required=True, choices=("merged", "peft"))
    add("--dtype", choices=("bfloat16", "float32"), help="default: the base's")
    add("--step", default="last", metavar="last|best|N", help="of a run")
    add("--rank", type=int, metavar="K", help="truncate the adapter to this rank")
    add("--base", metavar="DIR", help="of an adapter, if it has moved")


def _plan_arguments(plan: argparse.ArgumentParser) -> None:
    add = plan.add_argument
    add("file", metavar="RUN.yaml", type=Path)
    add("overrides", nargs="*", metavar="section.key=value")
    where = "v5e:4x4, 2xv5e:16x16, cpu:8, ..."
    add("--topology", required=True, metavar="KIND:SHAPE", help=where)
    add("--json", action="store_true", help="everything, for programs")


def _inspect_arguments(inspect: argparse.ArgumentParser) -> None:
    add = inspect.add_argument
    add("folder", metavar="DIR", type=Path)
    add("--json", action="store_true", help="everything, for programs")
    add("--png", metavar="FILE", type=Path, help="draw a map of the layers")


def _generate_arguments(generate: argparse.ArgumentParser) -> None:
    add = generate.add_argument
    add("model", metavar="MODEL", help="a model's folder or hub id, a run, or an adapter")
    add("--adapter", metavar="DIR[=WEIGHT]", action="append", default=[], help=ADAPTER)
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


def _evaluate_arguments(evaluate: argparse.ArgumentParser) -> None:
    add = evaluate.add_argument
    add("model", metavar="MODEL", help="a model's folder or hub id, a run, or an adapter")
    add("--adapter", metavar="DIR[=WEIGHT]", action="append", default=[], help=ADAPTER)
    add("--step", default="last", metavar="last|best|N", help="of a run")
    add("--task", required=True, action="append", metavar="NAME=FILE", help="as often as you like")
    add("--output", required=True, metavar="FILE.json", type=Path)
    add("--limit", type=int, metavar="N", help="the first N examples of every file")
    add("--max-new-tokens", type=int, metavar="N", help="default: what each task needs")
    add("--run-code", action="store_true", help="let humaneval and mbpp run what the model writes")
    add("--batch-size", type=int, default=8, metavar="N", help="prompts at a time")
    add("--dtype", choices=("auto", "bfloat16", "float32"), default="auto")
    add("--quantize", choices=("none", "int8", "int4", "nf4"), help="default: as a run was trained")


_COMMANDS = {
    "quickstart": (
        "train, export and check a small model, with no input and no network",
        _quickstart_arguments,
    ),
    "train": (
        "train what a YAML describes; carries on if its output holds a checkpoint",
        _train_arguments,
    ),
    "export": ("write what a run trained, or a PEFT adapter, for other tools", _export_arguments),
    "generate": (
        "complete the prompts of a file, or chat in the terminal without one",
        _generate_arguments,
    ),
    "evaluate": (
        "score a model on test sets; carries on where it was interrupted",
        _evaluate_arguments,
    ),
    "plan": (
        "say whether a run fits on devices that are not here, and how fast it could be",
        _plan_arguments,
    ),
    "inspect": ("say what a folder is, and what an adapter does to each layer", _inspect_arguments),
}
