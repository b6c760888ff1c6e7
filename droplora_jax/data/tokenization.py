"""From text to token ids."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterator, Sequence
from itertools import accumulate, chain, islice

import numpy as np

from droplora_jax.core.errors import InputError
from droplora_jax.data.rows import Row, row
from droplora_jax.data.templates.base import Document, Tokenizer


def encode(
    documents: Sequence[Document], tokenizer: Tokenizer, counts: Counter[str] | None = None
) -> list[Row]:
    """The documents as rows of any length.

    Args:
      documents: texts; BOS and EOS are not added where one begins or ends with them already.
      tokenizer: a Hugging Face tokenizer.
      counts: where the documents to which they were not added are counted, as `has_bos` and
        `has_eos`.

    Raises:
      InputError: a document must end with EOS and the tokenizer has none, or a document must be
        tokenised as one text and the tokenizer gives no offsets.
    """
    counts = Counter() if counts is None else counts
    in_pieces = _in_pieces([doc for doc in documents if doc.add_special], tokenizer, counts)
    at_once = _at_once([doc for doc in documents if not doc.add_special], tokenizer)
    return [next(in_pieces if doc.add_special else at_once) for doc in documents]


def _in_pieces(
    documents: Sequence[Document], tokenizer: Tokenizer, counts: Counter[str]
) -> Iterator[Row]:
    """Rows of BOS, every piece tokenised by itself, and a trained EOS."""
    if not documents:
        return
    begin, eos = _begin(tokenizer), _eos(tokenizer)
    ids = iter(_ids([piece.text for doc in documents for piece in doc.pieces], tokenizer))
    for document in documents:
        pieces = list(islice(ids, len(document.pieces)))
        has_bos = bool(begin) and pieces[0][: len(begin)] == begin
        has_eos = _ends_with_eos(document.pieces[-1].text, pieces[-1], tokenizer)
        counts["has_bos"] += has_bos
        counts["has_eos"] += has_eos
        parts = [[] if has_bos else begin, *pieces, [] if has_eos else [eos]]
        trained = [False, *(piece.trained for piece in document.pieces), True]
        lengths = [len(part) for part in parts]
        yield row(np.concatenate(parts).astype(np.int32), np.repeat(trained, lengths))


def _ends_with_eos(text: str, ids: Sequence[int], tokenizer: Tokenizer) -> bool:
    """Whether EOS ends a text; chat templates put a line end behind it."""
    written = text.rstrip("\n").endswith(tokenizer.eos_token)
    return written and tokenizer.eos_token_id in ids


def _at_once(documents: Sequence[Document], tokenizer: Tokenizer) -> Iterator[Row]:
    """Rows of texts tokenised at once; a token that overlaps a trained piece is trained."""
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
    for document, tokens, spans in zip(documents, ids, offsets, strict=True):
        starts, ends = np.array(spans, np.int64).reshape(-1, 2).T
        trained = np.zeros(len(tokens), bool)
        piece_ends = list(accumulate(len(piece.text) for piece in document.pieces))
        for piece, end in zip(document.pieces, piece_ends, strict=True):
            if piece.trained:
                trained |= (ends > end - len(piece.text)) & (starts < end)
        yield row(tokens, trained)


def _ids(texts: list[str], tokenizer: Tokenizer, *, add_special: bool = False) -> list[list[int]]:
    if not texts:
        return []  # tokenizers refuse an empty list
    # `verbose=False`: no warning of long texts, which `length_limit.py` handles.
    return tokenizer(texts, add_special_tokens=add_special, verbose=False)["input_ids"]


def _begin(tokenizer: Tokenizer) -> list[int]:
    """The special tokens that the tokenizer puts before a text (not those behind it)."""
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
    """The documents up to their last response, as the token ids of prompts.

    The ids are those that preceded the response in training: the same pieces with the same special
    tokens before them. A text that begins with these tokens already does not get them twice.
    """
    begin = _begin(tokenizer) if any(document.add_special for document in documents) else []
    texts = [_prompt_texts(document) for document in documents]
    ids = iter(_ids([text for prompt_texts in texts for text in prompt_texts], tokenizer))
    prompts = []
    for document, prompt_texts in zip(documents, texts, strict=True):
        prompt = list(chain.from_iterable(islice(ids, len(prompt_texts))))
        begun = not document.add_special or prompt[: len(begin)] == begin
        prompts.append(prompt if begun else begin + prompt)
    return prompts


def _prompt_texts(document: Document) -> list[str]:
    """The texts before the last response, each tokenised by itself."""
    trained = [i for i, piece in enumerate(document.pieces) if piece.trained]
    texts = [piece.text for piece in document.pieces[: trained[-1] if trained else None]]
    return texts if document.add_special else ["".join(texts)]
