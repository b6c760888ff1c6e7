"""Columns that are renamed to the keys of a format, and the format that a record has."""

from __future__ import annotations

from collections.abc import Iterator, Mapping

from droplora_jax.core.errors import InputError
from droplora_jax.data.formats import FORMATS
from droplora_jax.data.record import Fields

Columns = Mapping[str, str]  # from a key of a format to the name of the file's column


def renamed(record: Fields, columns: Columns) -> Fields:
    """The record with a format's keys. Where it lacks a column, the result lacks the key."""
    if not columns:
        return record
    others = {key: value for key, value in record.items() if key not in columns}
    return others | {key: record[name] for key, name in columns.items() if name in record}


def recognised(record: Fields, columns: Columns) -> str:
    """The name of the first format that matches a record and reads all mapped keys.

    Raises:
      InputError: no format does.
    """
    record = renamed(record, columns)
    for name, format in FORMATS.items():
        if format.matches(record) and all(key in format.read for key in columns):
            return name
    known = "; ".join(f"{name} ({format.keys})" for name, format in FORMATS.items())
    hint = described(columns) or (
        "; for other names say which column holds what, as in data.columns={prompt: q, "
        "completion: a}"
    )
    raise InputError(
        f"no format has the keys {', '.join(record) or '(none)'}; the formats are {known}{hint}"
    )


def column_problems(columns: Columns, format: str | None) -> Iterator[str]:
    """Keys that no format, or not the one that is named, reads."""
    formats = [FORMATS[format]] if format else list(FORMATS.values())
    known = dict.fromkeys(key for each in formats for key in each.read)
    unknown = [key for key in columns if key not in known]
    for key in unknown:
        yield (
            f"columns.{key}={columns[key]!r}: "
            f"{f'the format {format} does not read' if format else 'no format reads'} "
            f"this key; there are {', '.join(known)}"
        )
    if not unknown and not any(all(key in each.read for key in columns) for each in formats):
        yield f"columns: no format reads all of {', '.join(columns)}"


def described(columns: Columns) -> str:
    """The mapping of columns, to be appended to an error; empty without one."""
    reads = ", ".join(f"{key} from {name}" for key, name in columns.items())
    return f"; data.columns reads {reads}" if reads else ""
