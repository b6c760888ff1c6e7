"""Columns that are renamed to the keys of a format, and the format that a record has."""

from __future__ import annotations

from collections.abc import Collection, Iterator, Mapping
from dataclasses import dataclass

from droplora_jax.core.errors import InputError
from droplora_jax.data.formats import FORMATS
from droplora_jax.data.record import Fields

Columns = Mapping[str, str]  # from a key of a format to the name of the file's column
_KEYS = 20  # of a record that no format matches, the most that an error names


@dataclass(frozen=True)
class Renamed(Mapping[str, object]):
    """A record by a format's keys; a value is not looked at before it is read.

    Attributes:
      record: as the file holds it.
      columns: a key that is mapped to a column which the record lacks is lacking here, too.
      ignored: keys that are passed over, in the record and in the objects of its lists.
    """

    record: Fields
    columns: Columns
    ignored: Collection[str] = ()

    def __getitem__(self, key: str) -> object:
        if key not in self:
            raise KeyError(key)
        value = self.record[self.columns.get(key, key)]
        if not self.ignored or not isinstance(value, list):
            return value
        return [self._kept(item) for item in value]

    def _kept(self, item: object) -> object:
        if not isinstance(item, dict):
            return item
        return {key: value for key, value in item.items() if key not in self.ignored}

    def __contains__(self, key: object) -> bool:
        if not isinstance(key, str) or key in self.ignored:
            return False
        return self.columns.get(key, key) in self.record

    def __iter__(self) -> Iterator[str]:
        keys = dict.fromkeys((*self.record, *self.columns))
        return (key for key in keys if key in self)

    def __len__(self) -> int:
        return sum(1 for _ in self)


def renamed(record: Fields, columns: Columns, ignored: Collection[str] = ()) -> Fields:
    """The record with a format's keys, without those that are ignored."""
    return Renamed(record, columns, ignored) if columns or ignored else record


def recognised(record: Fields, columns: Columns, ignored: Collection[str] = ()) -> str:
    """The name of the first format that matches a record and reads all mapped keys.

    Raises:
      InputError: no format does.
    """
    record = renamed(record, columns, ignored)
    for name, format in FORMATS.items():
        if format.matches(record) and all(key in format.read for key in columns):
            return name
    known = "; ".join(f"{name} ({format.keys})" for name, format in FORMATS.items())
    hint = described(columns) or (
        "; for other names say which column holds what, as in data.columns={prompt: q, "
        "completion: a}"
    )
    raise InputError(f"no format has the keys {_listed(record)}; the formats are {known}{hint}")


def _listed(record: Fields) -> str:
    keys = list(record)
    more = f" and {len(keys) - _KEYS:,} more" if len(keys) > _KEYS else ""
    return ", ".join(keys[:_KEYS]) + more if keys else "(none)"


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
