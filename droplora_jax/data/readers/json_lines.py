"""JSON Lines: one object on each line; empty lines are skipped."""

from __future__ import annotations

import json
from collections.abc import Iterator
from io import BufferedIOBase

from droplora_jax.core.errors import InputError
from droplora_jax.data.readers.base import Reader, Record, as_object, lines


def _records(stream: BufferedIOBase, name: str) -> Iterator[Record]:
    for number, line in lines(stream, name):
        if not line.strip():
            continue
        where = f"{name}:{number}"
        try:
            row = json.loads(line)
        except (ValueError, RecursionError) as error:
            hint = "; a .jsonl file holds one object a line, a list goes into a .json file"
            listed = number == 1 and line.lstrip().startswith("[")
            raise InputError(f"{where}: broken JSON ({error}){hint if listed else ''}") from error
        yield where, as_object(where, row)


JSON_LINES = Reader(_records)
