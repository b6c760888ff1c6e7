"""JSON and JSON Lines files: their bytes, and their records with where each one stands."""

from __future__ import annotations

import gzip
import json
import zlib
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

from droplora_jax.errors import InputError

Record = tuple[str, Mapping[str, Any]]  # where it stands, for errors; and the object
KINDS = (".json", ".jsonl")


def content(path: str) -> bytes:
    """The bytes of a file as they lie on disk.

    Raises:
      InputError: the file can't be read.
    """
    try:
        return Path(path).expanduser().read_bytes()
    except FileNotFoundError as error:
        raise InputError(f"{path}: no such file") from error
    except OSError as error:
        raise InputError(f"{path}: can't be read ({error.strerror})") from error


def records(path: str, raw: bytes) -> Iterator[Record]:
    """The objects in a file's bytes, each with where it stands: "a.jsonl:17", "a.json, row 17".

    Raises:
      InputError: names the file, the line and the rule.
    """
    name = path.lower().removesuffix(".gz")
    if not name.endswith(KINDS):
        raise InputError(f"{path}: must be a .json or .jsonl file, or a .gz of one")
    text = _decode(path, _decompress(path, raw) if path.lower().endswith(".gz") else raw)
    if not text.strip():
        raise InputError(f"{path}: the file is empty")
    return _lines(path, text) if name.endswith(".jsonl") else _list(path, text)


def _decompress(path: str, raw: bytes) -> bytes:
    try:
        return gzip.decompress(raw)
    except (OSError, EOFError, zlib.error) as error:
        raise InputError(f"{path}: not a whole gzip file ({error})") from error


def _decode(path: str, raw: bytes) -> str:
    try:
        return raw.decode("utf-8-sig")
    except UnicodeDecodeError as error:
        line = error.object.count(b"\n", 0, error.start) + 1
        byte = error.object[error.start]
        raise InputError(
            f"{path}:{line}: not UTF-8 (byte 0x{byte:02x}); save it as UTF-8"
        ) from error


def _lines(path: str, text: str) -> Iterator[Record]:
    for number, line in enumerate(text.split("\n"), 1):
        if not line.strip():
            continue
        where = f"{path}:{number}"
        try:
            row = json.loads(line)
        except (ValueError, RecursionError) as error:
            hint = "; a .jsonl file holds one object a line, a list goes into a .json file"
            listed = number == 1 and line.lstrip().startswith("[")
            raise InputError(f"{where}: broken JSON ({error}){hint if listed else ''}") from error
        yield where, _object(where, row)


def _list(path: str, text: str) -> Iterator[Record]:
    try:
        rows = json.loads(text)
    except json.JSONDecodeError as error:
        hint = "; a file of one object a line is named .jsonl" if error.msg == "Extra data" else ""
        raise InputError(f"{path}:{error.lineno}: broken JSON ({error}){hint}") from error
    except (ValueError, RecursionError) as error:
        raise InputError(f"{path}: broken JSON ({error})") from error
    if not isinstance(rows, list):
        raise InputError(f"{path}: must be a list of objects, is {_kind(rows)}")
    if not rows:
        raise InputError(f"{path}: the list is empty")
    for number, row in enumerate(rows, 1):
        where = f"{path}, row {number}"
        yield where, _object(where, row)


def _object(where: str, row: Any) -> Mapping[str, Any]:
    if not isinstance(row, dict):
        raise InputError(f"{where}: must be an object with keys, is {_kind(row)}")
    return row


def _kind(value: Any) -> str:
    kinds = {dict: "an object", list: "a list", str: "text", type(None): "null"}
    return kinds.get(type(value), repr(value))
