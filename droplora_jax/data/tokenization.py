"""From text to token ids."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from itertools import accumulate, chain, islice

import numpy as np

from droplora_jax.core.errors import InputError
from droplora_jax.data.rows import Row, row
from droplora_jax.data.templates.base import Document, Tokenizer


def encode(documents: Sequence[Document], tokenizer: Tokenizer) -> list[Row]:
    """The documents as rows, however long.

    Raises:
      InputError: a document is to end with EOS, and the tokenizer has none; or one is to be
        tokenised as a whole, and the tokenizer can't say which text a token stands for.
    """
    in_pieces = _in_pieces([doc for doc in documents if doc.add_special], tokenizer)
    whole = _whole([doc for doc in documents if not doc.add_special], tokenizer)
    return [next(in_pieces if doc.add_special else whole) for doc in documents]


def _in_pieces(documents: Sequence[Document], tokenizer: Tokenizer) -> Iterator[Row]:
    """BOS, every piece tokenised by itself, and a trained EOS."""
    if not documents:
        return
    begin, end = _begin(tokenizer), [_eos(tokenizer)]
    ids = iter(_ids([piece.text for doc in documents for piece in doc.pieces], tokenizer))
    for document in documents:
        parts = [begin, *islice(ids, len(document.pieces)), end]
        trained = [False, *(piece.trained for piece in document.pieces), True]
        lengths = [len(part) for part in parts]
        yield row(np.concatenate(parts).astype(np.int32), np.repeat(trained, lengths))


def _whole(documents: Sequence[Document], tokenizer: Tokenizer) -> Iterator[Row]:
    """The text tokenised at once; a token that reaches into a trained piece is trained."""
    if not documents:
        return
    if not tokenizer.is_fast:
        raise InputError(
            "data.template=chat: the tokenizer can't say which text a token stands for; it needs "
            "a tokenizer.json"
        )
    texts = ["".join(piece.text for piece in doc.pieces) for doc in documents]
    encoded = tokenizer(texts, add_special_tokens=False, return_offsets_mapping=True, verbose=False)
    ids, offsets = encoded["input_ids"], encoded["offset_mapping"]
    for document, own, places in zip(documents, ids, offsets, strict=True):
        starts, ends = np.array(places, np.int64).reshape(-1, 2).T
        trained = np.zeros(len(own), bool)
        upto = list(accumulate(len(piece.text) for piece in document.pieces))
        for piece, end in zip(document.pieces, upto, strict=True):
            if piece.trained:
                trained |= (ends > end - len(piece.text)) & (starts < end)
        yield row(own, trained)


def _ids(texts: list[str], tokenizer: Tokenizer, *, add_special: bool = False) -> list[list[int]]:
    if not texts:
        return []  # of which no tokenizer makes anything
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


def encode_prompts(documents: Sequence[Document], tokenizer: Tokenizer) -> list[list[int]]:
    """The documents up to their last response, as token ids to go on from.

    They are what the model was trained to go on from: the same pieces, the same special tokens
    before them. A text that begins with those already does not get them twice.
    """
    begin = _begin(tokenizer) if any(document.add_special for document in documents) else []
    texts = [_prompt_texts(document) for document in documents]
    ids = iter(_ids([text for own in texts for text in own], tokenizer))
    prompts = []
    for document, own in zip(documents, texts, strict=True):
        prompt = list(chain.from_iterable(islice(ids, len(own))))
        begun = not document.add_special or prompt[: len(begin)] == begin
        prompts.append(prompt if begun else begin + prompt)
    return prompts


def _prompt_texts(document: Document) -> list[str]:
    """What is before the last response, as it is tokenised: in pieces, or as a whole."""
    trained = [i for i, piece in enumerate(document.pieces) if piece.trained]
    texts = [piece.text for piece in document.pieces[: trained[-1] if trained else None]]
    return texts if document.add_special else ["".join(texts)]
