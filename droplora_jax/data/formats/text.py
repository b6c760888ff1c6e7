"""Plain text, all of it learnt."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from droplora_jax.data.formats.base import Example, Format, text_of


def convert(record: Mapping[str, Any]) -> Example:
    return Example(text=text_of(record, "text"))


TEXT = Format(("text",), "none", convert)
