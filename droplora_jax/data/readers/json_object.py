"""One JSON object that holds all rows of a file: as a list, by columns, or by an index."""

from __future__ import annotations

from collections.abc import Sequence

from droplora_jax.core.errors import InputError
from droplora_jax.data.record import Fields

ROWS = ("data", "rows", "train", "examples", "instances", "records", "items")
OTHER_SPLITS = ("test", "validation", "valid", "dev", "eval")


def rows_within(name: str, value: Fields) -> Sequence[object] | None:
    """The rows that an object holds; None if it is a row itself.

    Args:
      name: that of the file, for errors.

    Raises:
      InputError: the object holds several lists of rows.
    """
    lists = [key for key in (*ROWS, *OTHER_SPLITS) if _is_objects(value.get(key))]
    if len(lists) > 1:
        raise InputError(
            f"{name}: holds several lists of rows ({', '.join(lists)}); write the one that is "
            "meant into a file of its own"
        )
    if lists:
        rows = value[lists[0]]
        return rows if isinstance(rows, list) else None
    if all(part == [] for part in value.values()):
        return []
    return _from_columns(value) or _by_index(value)


def _is_objects(value: object) -> bool:
    return isinstance(value, list) and bool(value) and all(isinstance(v, dict) for v in value)


def _from_columns(value: Fields) -> Sequence[object] | None:
    """Rows of an object that has a list of values for each column."""
    columns = [column for column in value.values() if isinstance(column, list)]
    lengths = {len(column) for column in columns}
    if len(columns) < len(value) or len(lengths) != 1 or all(map(_is_objects, columns)):
        return None
    return [dict(zip(value, row, strict=True)) for row in zip(*columns, strict=True)]


def _by_index(value: Fields) -> Sequence[object] | None:
    """Rows of an object of objects with the same keys.

    The outer keys name the columns if the inner ones number the rows, as pandas writes it, and else
    the outer ones name the rows.
    """
    parts = [part for part in value.values() if isinstance(part, dict)]
    if len(parts) < max(len(value), 1) or any(part.keys() != parts[0].keys() for part in parts):
        return None
    if parts[0] and all(key.isdecimal() for key in parts[0]):
        return [
            {column: part[i] for column, part in zip(value, parts, strict=True)} for i in parts[0]
        ]
    return parts
