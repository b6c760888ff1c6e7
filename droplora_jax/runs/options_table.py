"""The table of a run's options, from the dataclasses that read them: `python -m` this module.

`README.md` beside it holds the table between two comments; a test says when it is not current.
"""

from __future__ import annotations

import dataclasses
import inspect
import re
import typing
from collections.abc import Iterator, Mapping, Sequence
from types import NoneType, UnionType
from typing import Any, NamedTuple

from droplora_jax.runs.config import RunConfig

BEGIN = "<!-- options: python -m droplora_jax.runs.options_table -->"
END = "<!-- end of options -->"


class Option(NamedTuple):
    """A key of the YAML.

    Attributes:
      values: what may stand there, in words.
      default: as YAML; empty where there is none, or where leaving the key out is the only way.
      meaning: the sentence of the dataclass's docstring.
    """

    key: str
    values: str
    default: str
    meaning: str


def table() -> str:
    """All options as a Markdown table."""
    head = "| key | values | default | meaning |\n|---|---|---|---|\n"
    rows = (
        f"| `{o.key}` | {o.values} | {f'`{o.default}`' if o.default else ''} | {o.meaning} |\n"
        for o in options()
    )
    return head + "".join(rows)


def options() -> Iterator[Option]:
    """Every key that a run's YAML may have, in the order of the dataclasses."""
    hints = typing.get_type_hints(RunConfig)
    for field in dataclasses.fields(RunConfig):
        sections = _dataclasses(hints[field.name])
        if not sections:
            yield _option(RunConfig, field, field.name, "")
        names = dict.fromkeys(f.name for section in sections for f in dataclasses.fields(section))
        for name in names:
            holders = [s for s in sections if name in {f.name for f in dataclasses.fields(s)}]
            field_of = {f.name: f for f in dataclasses.fields(holders[0])}[name]
            kinds = [f"`{_kind(section)}`" for section in holders] if len(sections) > 1 else []
            only = f" Kind {' or '.join(kinds)} only." if len(holders) < len(sections) else ""
            option = _option(holders[0], field_of, f"{field.name}.{name}", only)
            yield option._replace(values=", ".join(kinds)) if name == "kind" else option


def meanings(cls: type) -> dict[str, str]:
    """What the `Attributes` of a dataclass and its bases say of each field."""
    meaning_of = {"kind": "the kind of adapter: see `adapters/README.md`"}
    for base in reversed(inspect.getmro(cls)):
        _, *text = re.split(r"Attributes[^\n]*:\n", base.__dict__.get("__doc__") or "")
        section = inspect.cleandoc("\n" + "".join(text).partition("\n\n")[0])
        for entry in re.split(r"\n(?=\S)", section):
            names, colon, meaning = entry.partition(":")
            if colon:
                sentence = " ".join(meaning.split())
                meaning_of |= dict.fromkeys(re.split(r",\s*", names), sentence)
    return meaning_of


def _option(cls: type, field: dataclasses.Field[Any], key: str, only: str) -> Option:
    values = _values(typing.get_type_hints(cls)[field.name])
    meaning = meanings(cls)[field.name] + only
    return Option(key, values, _default(field), _cell(meaning))


def _default(field: dataclasses.Field[Any]) -> str:
    if field.default_factory is not dataclasses.MISSING:
        return _yaml(field.default_factory())
    return "" if field.default in (dataclasses.MISSING, None) else _yaml(field.default)


def _yaml(value: object) -> str:
    if isinstance(value, bool):
        return str(value).lower()
    if isinstance(value, Mapping):
        return "{}" if not value else str(dict(value))
    if isinstance(value, tuple | list):
        return f"[{', '.join(map(_yaml, value))}]"
    return str(value)


def _values(hint: Any) -> str:
    """A type in words, such as `int`, or the words that may stand there."""
    origin, arguments = typing.get_origin(hint), typing.get_args(hint)
    if origin is typing.Annotated:
        return _values(arguments[0])
    if origin is typing.Literal:
        return ", ".join(f"`{_yaml(value)}`" for value in arguments)
    if origin in (typing.Union, UnionType):
        return " or ".join(dict.fromkeys(_values(a) for a in arguments if a is not NoneType))
    if origin is tuple or origin in (list, Sequence):
        return f"list of {_values(arguments[0])}"
    if origin is not None and issubclass(origin, Mapping):
        return f"map to {_values(arguments[1])}"
    if dataclasses.is_dataclass(hint):
        return "{" + ", ".join(field.name for field in dataclasses.fields(hint)) + "}"
    return {str: "text", int: "integer", float: "number", bool: "`true`, `false`"}[hint]


def _dataclasses(hint: Any) -> list[type]:
    """The dataclass that a section is read as; of several kinds all."""
    if dataclasses.is_dataclass(hint) and isinstance(hint, type):
        return [hint]
    return [cls for part in typing.get_args(hint) for cls in _dataclasses(part)]


def _kind(section: type) -> str:
    """The kind of adapter that a dataclass is read for."""
    return typing.cast(str, getattr(section, "kind", ""))


def _cell(text: str) -> str:
    return text.replace("|", "\\|")[:1].upper() + text.replace("|", "\\|")[1:]


if __name__ == "__main__":
    print(table(), end="")
