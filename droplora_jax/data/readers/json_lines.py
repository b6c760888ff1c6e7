"""JSON Lines: one object on each line; empty lines are skipped."""

from __future__ import annotations

import json
from collections.abc import Iterator
from io import BufferedIOBase

from droplora_jax.core.errors import InputError
from droplora_jax.data.readers.base import Read, Reader, as_object, decoded, lines
from droplora_jax.data.record import Fields


def _records(stream: BufferedIOBase, name: str) -> Iterator[Read]:
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
        hint = "; a .jsonl file holds one object a line, a list goes into a .json file"
        listed = number == 1 and line.lstrip().startswith(b"[")
        return InputError(f"{where}: broken JSON ({error}){hint if listed else ''}")


JSON_LINES = Reader(_records, text=True)
