"""A prompt, taken as it is, and its completion."""

from __future__ import annotations

from droplora_jax.data.formats.base import Example, Format, exchange, text_of
from droplora_jax.data.record import Fields


def convert(record: Fields) -> Example:
    return exchange(text_of(record, "prompt", may_be_empty=True), text_of(record, "completion"))


PROMPT_COMPLETION = Format(("prompt", "completion"), "none", convert)
