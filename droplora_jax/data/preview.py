"""A row as text, for a person to see what is trained on."""

from __future__ import annotations

import numpy as np

from droplora_jax.data.rows import Row
from droplora_jax.data.templates.base import Tokenizer, shared_prefix


def preview(row: Row, tokenizer: Tokenizer) -> list[tuple[str, bool]]:
    """The decoded row, special tokens shown, in spans of (text, whether it is trained).

    The spans joined are the whole row decoded at once. A character whose bytes are spread over
    tokens of two spans stands in the second.
    """
    whole = _decode(row.ids, tokenizer)
    changes = np.flatnonzero(np.diff(row.trained)) + 1
    spans: list[tuple[str, bool]] = []
    start, done = 0, 0
    for end in (*changes.tolist(), len(row)):
        # Up to half a character the beginning decodes as it does within the whole.
        upto = max(shared_prefix(_decode(row.ids[:end], tokenizer), whole), done)
        if upto > done:
            spans.append((whole[done:upto], bool(row.trained[start])))
        start, done = end, upto
    return spans


def _decode(ids: np.ndarray, tokenizer: Tokenizer) -> str:
    text = tokenizer.decode(
        ids.tolist(), skip_special_tokens=False, clean_up_tokenization_spaces=False
    )
    return str(text)
