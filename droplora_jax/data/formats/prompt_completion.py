"""A prompt, taken as it is, and its completion."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from droplora_jax.data.formats.base import Example, Format, exchange, text_of


def convert(record: Mapping[str, Any]) -> Example:
    return exchange(text_of(record, "prompt", may_be_empty=True), text_of(record, "completion"))


PROMPT_COMPLETION = Format(("prompt", "completion"), "none", convert)
