"""Plain text, all of it trained on."""

from __future__ import annotations

from droplora_jax.data.formats.base import Example, Format, text_of
from droplora_jax.data.record import Fields


def convert(record: Fields) -> Example:
    return Example(text=text_of(record, "text"))


TEXT = Format(("text",), "none", convert)
