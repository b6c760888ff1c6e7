"""Rows of an unfinished output, in a file beside it, from which the work can be resumed."""

from __future__ import annotations

import json
from collections.abc import Mapping
from pathlib import Path

from droplora_jax.core.errors import InputError
from droplora_jax.core.files import Row, read_jsonl, write_file

SETTINGS = "settings"


class Partial:
    """Rows in `OUTPUT.part`; the first line of that file holds the settings they depend on.

    Attributes:
      rows: the rows so far.
    """

    def __init__(self, output: Path, settings: Mapping[str, object]) -> None:
        """
        Raises:
          InputError: the file exists and was begun with other settings, or by something else.
        """
        self.file = output.with_name(f"{output.name}.part")
        self.settings = json.loads(json.dumps(settings))  # as they are read back
        self.rows: list[Row] = []
        if self.file.exists():
            before = self._read_settings()
            self.rows = read_jsonl(self.file)[1:]
            if self.rows:
                self._check(before)
            self._write_all()  # drops a row that a crash cut short

    def write(self, row: Row) -> None:
        self.rows.append(row)
        if len(self.rows) == 1:
            self._write_all()
            return
        with self.file.open("a", encoding="utf-8") as file:
            file.write(json.dumps(row) + "\n")

    def remove(self) -> None:
        """Remove the file, once the output is complete."""
        self.file.unlink(missing_ok=True)

    def _write_all(self) -> None:
        lines = [{SETTINGS: self.settings}, *self.rows]
        self.file.parent.mkdir(parents=True, exist_ok=True)
        write_file(self.file, "".join(json.dumps(line) + "\n" for line in lines))

    def _read_settings(self) -> dict[str, object]:
        with self.file.open("rb") as file:
            first = file.readline()
        try:
            before = json.loads(first)[SETTINGS]
        except (ValueError, LookupError, TypeError):
            before = None
        if not isinstance(before, dict):
            raise InputError(
                f"{self.file}: is there, and was not begun by this command; nothing is "
                "overwritten. Name another output, or move it away"
            )
        return before

    def _check(self, before: Mapping[str, object]) -> None:
        changed = [
            f"{key}: {before.get(key)!r:.80} -> {self.settings.get(key)!r:.80}"
            for key in sorted({*before, *self.settings})
            if before.get(key) != self.settings.get(key)
        ]
        if changed:
            raise InputError(
                f"{self.file}: was begun with other settings ({'; '.join(changed)}). Put them "
                "back to carry on, name another output, or remove it"
            )
