"""From dataclasses to a command line: the fields of a command are its arguments.

A field without a default is a positional argument, or a required flag if it says so; a field with
a default is a flag of its name. `bool` is a switch, a `Literal` a choice, a tuple may be given
several times, and a field made by `group` holds the flags of another dataclass. A command checks
its values when it is built, before what does its work is imported.
"""

from __future__ import annotations

import argparse
import dataclasses
from collections.abc import Iterator, Mapping, Sequence
from types import NoneType
from typing import (
    Any,
    Literal,
    Protocol,
    TypeVar,
    get_args,
    get_origin,
    get_type_hints,
    runtime_checkable,
)

T = TypeVar("T")


@runtime_checkable
class Command(Protocol):
    """A command: a dataclass whose fields are its arguments and whose docstring begins its help."""

    def run(self) -> int | None:
        """Do it; returns the exit code, None for 0."""


def option(
    metavar: str | None = None,
    help: str | None = None,
    *,
    default: Any = dataclasses.MISSING,
    **argparse: Any,
) -> Any:
    """A field with what the command line says of it.

    Args:
      metavar, help: as in `argparse`.
      default: makes it a flag; without one it is a positional argument, unless `required=True`.
      argparse: further arguments of `add_argument`; and `last=True`: stands behind all others.
    """
    said = {"metavar": metavar, "help": help, **argparse}
    return dataclasses.field(default=default, metadata={"argument": said})


def group(options: type, /, **said: Mapping[str, Any]) -> Any:
    """A field that holds the flags of another dataclass; `said`: what `option` says, for each."""
    return dataclasses.field(default_factory=options, metadata={"group": said})


def command_line(commands: Mapping[str, type[Command]]) -> argparse.ArgumentParser:
    """A parser; what it returns has the chosen command's class in `command`."""
    parser = argparse.ArgumentParser(
        prog="droplora", description="Fine-tune LLaMA-family models with DropLoRA in JAX."
    )
    subparsers = parser.add_subparsers(required=True, metavar="COMMAND")
    for name, command in commands.items():
        subparser = subparsers.add_parser(name, help=_help(command))
        arguments = sorted(_arguments(command), key=lambda argument: argument.last)
        for argument in arguments:
            subparser.add_argument(*argument.flags, **argument.keywords)
        subparser.set_defaults(command=command)
    return parser


def build(options: type[T], values: Mapping[str, Any]) -> T:
    """A command, or a group of its options, from the values that were parsed."""
    types = get_type_hints(options)
    arguments = {}
    for field in dataclasses.fields(options):  # type: ignore[arg-type]
        kind = types[field.name]
        if "group" in field.metadata:
            arguments[field.name] = build(kind, values)
        else:
            value = values[field.name]
            arguments[field.name] = tuple(value) if isinstance(value, list) else value
    return options(**arguments)


@dataclasses.dataclass(frozen=True)
class _Argument:
    flags: Sequence[str]
    keywords: Mapping[str, Any]
    last: bool


def _arguments(options: type, said: Mapping[str, Any] | None = None) -> Iterator[_Argument]:
    types = get_type_hints(options)
    for field in dataclasses.fields(options):
        if "group" in field.metadata:
            yield from _arguments(types[field.name], field.metadata["group"])
            continue
        keywords = dict((said or {}).get(field.name) or field.metadata.get("argument", {}))
        last = keywords.pop("last", False)
        keywords = {**_keywords(types[field.name]), **keywords}
        if "nargs" in keywords:
            keywords["action"] = "extend"
        positional = field.default is dataclasses.MISSING and not keywords.get("required")
        if positional:
            flags = [field.name]
        else:
            flags = [f"--{field.name.replace('_', '-')}"]
            if field.default is not dataclasses.MISSING:
                default = field.default
                keywords["default"] = list(default) if isinstance(default, tuple) else default
        yield _Argument(flags, {k: v for k, v in keywords.items() if v is not None}, last)


def _keywords(kind: Any) -> dict[str, Any]:
    """What argparse has to know of a type; the first choice of an optional one."""
    if NoneType in get_args(kind):
        (kind,) = (each for each in get_args(kind) if each is not NoneType)
    if kind is bool:
        return {"action": "store_true", "metavar": None}
    if get_origin(kind) is Literal:
        return {"choices": get_args(kind)}
    if get_origin(kind) is tuple:
        return {"action": "append"}
    return {} if kind is str else {"type": kind}


def _help(command: type) -> str:
    """The first sentence of the docstring, as argparse's own help is written."""
    first = (command.__doc__ or "").partition("\n\n")[0]
    text = " ".join(first.split()).removesuffix(".")
    return text[:1].lower() + text[1:]
