"""A row decoded to text that shows what is trained on."""

from __future__ import annotations

import numpy as np

from droplora_jax.data.rows import Row
from droplora_jax.data.templates.base import Tokenizer, shared_prefix


def preview(row: Row, tokenizer: Tokenizer) -> list[tuple[str, bool]]:
    """The decoded row with its special tokens, in spans of (text, whether it is trained).

    Joined, the spans are the text of the row decoded at once. A character whose bytes belong to the
    tokens of two spans stands in the second span.
    """
    text = _decode(row.ids, tokenizer)
    changes = np.flatnonzero(np.diff(row.trained)) + 1
    spans: list[tuple[str, bool]] = []
    start, done = 0, 0
    for end in (*changes.tolist(), len(row)):
        # The decoded beginning agrees with the full text up to a character that is cut in half.
        upto = max(shared_prefix(_decode(row.ids[:end], tokenizer), text), done)
        if upto > done:
            spans.append((text[done:upto], bool(row.trained[start])))
        start, done = end, upto
    return spans


def _decode(ids: np.ndarray, tokenizer: Tokenizer) -> str:
    text = tokenizer.decode(
        ids.tolist(), skip_special_tokens=False, clean_up_tokenization_spaces=False
    )
    return str(text)
