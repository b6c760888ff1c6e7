"""Alpaca: an instruction, what it applies to, and the response."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from droplora_jax.data.formats.base import Example, Format, exchange, text_of


def convert(record: Mapping[str, Any]) -> Example:
    given = record.get("input") is not None  # left out or null: none
    return exchange(
        text_of(record, "instruction"),
        text_of(record, "output"),
        input=text_of(record, "input", may_be_empty=True) if given else "",
    )


ALPACA = Format(("instruction", "output"), "alpaca", convert, optional=("input",))
