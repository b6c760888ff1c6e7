"""The formats of a record, one file each; `auto` takes the first whose keys are all there."""

from droplora_jax.data.formats.alpaca import ALPACA
from droplora_jax.data.formats.base import Example, Format, Turn
from droplora_jax.data.formats.messages import MESSAGES
from droplora_jax.data.formats.prompt_completion import PROMPT_COMPLETION
from droplora_jax.data.formats.text import TEXT

# The more telling keys first: many instruction data sets also carry a `text`.
FORMATS: dict[str, Format] = {
    "messages": MESSAGES,
    "alpaca": ALPACA,
    "prompt_completion": PROMPT_COMPLETION,
    "text": TEXT,
}

__all__ = ["FORMATS", "Example", "Format", "Turn"]
