"""From text to token ids."""

from __future__ import annotations

from collections.abc import Sequence
from itertools import islice

import numpy as np

from droplora_jax.data.rows import Row, row
from droplora_jax.data.templates.base import Document, Tokenizer
from droplora_jax.errors import InputError


def encode(documents: Sequence[Document], tokenizer: Tokenizer) -> list[Row]:
    """The documents as rows, however long; every piece is tokenised by itself.

    Raises:
      InputError: a document is to end with EOS, and the tokenizer has none.
    """
    begin: list[int] = []
    end: list[int] = []
    if any(document.add_special for document in documents):
        begin, end = _begin(tokenizer), [_eos(tokenizer)]
    ids = iter(_ids([piece.text for doc in documents for piece in doc.pieces], tokenizer))
    rows = []
    for document in documents:
        parts = list(islice(ids, len(document.pieces)))
        trained = [piece.trained for piece in document.pieces]
        if document.add_special:
            parts, trained = [begin, *parts, end], [False, *trained, True]
        lengths = [len(part) for part in parts]
        rows.append(row(np.concatenate(parts).astype(np.int32), np.repeat(trained, lengths)))
    return rows


def _ids(texts: list[str], tokenizer: Tokenizer, *, add_special: bool = False) -> list[list[int]]:
    # Without `verbose=False` it warns of text longer than the model takes, which is seen to here.
    return tokenizer(texts, add_special_tokens=add_special, verbose=False)["input_ids"]


def _begin(tokenizer: Tokenizer) -> list[int]:
    """What the tokenizer puts before a text. What it puts behind one is not for a prompt."""
    probe = ["a"]
    (bare,), (full,) = _ids(probe, tokenizer), _ids(probe, tokenizer, add_special=True)
    for at in range(len(full) - len(bare) + 1):
        if bare and full[at : at + len(bare)] == bare:
            return full[:at]
    raise InputError(
        f"the tokenizer turns {probe[0]!r} into {bare}, but with special tokens into {full}: "
        "it must add them before or behind the text"
    )


def _eos(tokenizer: Tokenizer) -> int:
    if tokenizer.eos_token_id is None:
        raise InputError(
            "the tokenizer has no EOS token, with which every response ends; set eos_token in its "
            "tokenizer_config.json"
        )
    return tokenizer.eos_token_id
