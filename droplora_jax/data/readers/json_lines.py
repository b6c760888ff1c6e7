"""JSON Lines: one object on each line; empty lines are skipped."""

from __future__ import annotations

import json
from collections.abc import Iterator
from io import BufferedIOBase

from droplora_jax.core.errors import InputError
from droplora_jax.data.readers.base import (
    MARK,
    Read,
    Reader,
    as_object,
    decoded,
    lines,
    next_bytes,
)
from droplora_jax.data.readers.json_list import JSON_LIST
from droplora_jax.data.record import Fields


def _records(stream: BufferedIOBase, name: str) -> Iterator[Read]:
    if next_bytes(stream).removeprefix(MARK).lstrip().startswith(b"["):
        yield from JSON_LIST.records(stream, name)  # no object begins so
        return
    for number, line in lines(stream, name):
        if line.strip():
            yield f"{name}:{number}", _record(line, name, number)


def _record(line: bytes, name: str, number: int) -> Fields | InputError:
    where = f"{name}:{number}"
    try:
        return as_object(where, json.loads(decoded(line, name, number)))
    except InputError as error:
        return error
    except (ValueError, RecursionError) as error:
        return InputError(f"{where}: broken JSON ({error})")


JSON_LINES = Reader(_records, text=True)
