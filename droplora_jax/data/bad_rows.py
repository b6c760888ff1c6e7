"""Rows that are not as they should be, in the words of one error."""

from __future__ import annotations

import re
from collections.abc import Sequence
from typing import NamedTuple

from droplora_jax.core.errors import InputError

MOST = 100  # bad rows of a file after which reading stops
_PLACES = 5  # rows of one kind that an error names
_KINDS = 10
_VALUES = re.compile(r"'[^']*'|\"[^\"]*\"|\d[\d,.]*")  # what differs between rows of one kind


class BadRow(NamedTuple):
    """The place of a row, and what is wrong with it; the error's text begins with the place."""

    where: str
    error: InputError

    @property
    def reason(self) -> str:
        return str(self.error).removeprefix(f"{self.where}: ")


def bad_rows_error(name: str, bad: Sequence[BadRow], *, all_read: bool, others: bool) -> InputError:
    """One error of all bad rows of a file, in which rows with the same fault share a line.

    Args:
      name: that of the file.
      bad: at least one row.
      all_read: whether the file was read to its end.
      others: whether the file has other rows, so that leaving these out is a way on.
    """
    kinds: dict[str, list[BadRow]] = {}
    for row in bad:
        kinds.setdefault(_VALUES.sub("", row.reason), []).append(row)
    problems = [_line(name, rows) for rows in kinds.values()]
    if len(problems) > _KINDS:
        problems = [*problems[:_KINDS], f"and {len(problems) - _KINDS} faults of other kinds"]
    if others:
        these = "1 row" if len(bad) == 1 else f"{len(bad)} rows"
        so_far = "" if all_read else " so far"
        problems.append(f"data.bad_rows=drop leaves such rows out ({these}{so_far}) and names them")
    return InputError(*problems)


def _line(name: str, rows: Sequence[BadRow]) -> str:
    first, *same = rows
    if not same:
        return str(first.error)
    places = ", ".join(row.where.removeprefix(name).lstrip(":, ") for row in same[:_PLACES])
    more = f" and {len(same) - _PLACES} more" if len(same) > _PLACES else ""
    return f"{first.error} (and so {places}{more})"
