"""Alpaca: an instruction, an optional input that it applies to, and the response."""

from __future__ import annotations

from droplora_jax.data.formats.base import Example, Format, check_context, text_of
from droplora_jax.data.formats.dialogue import BEFORE, dialogue
from droplora_jax.data.record import Fields


def convert(record: Fields) -> Example:
    has_input = record.get("input") is not None
    input = text_of(record, "input", may_be_empty=True) if has_input else ""
    if not input:
        check_context(record, "input: context")
    return dialogue(record, text_of(record, "instruction"), text_of(record, "output"), input)


ALPACA = Format(("instruction", "output"), "alpaca", convert, optional=("input", *BEFORE))
