"""What ends an answer: what training teaches, generation stops at and exports record."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from typing import Any

from droplora_jax.data.templates.base import Document, Tokenizer

RECORD_KEY = "end_markers"  # in the record of a run, and in the file beside an adapter


@dataclass(frozen=True)
class EndMarkers:
    """The markers that end an answer.

    Attributes:
      token_ids: tokens, each of which ends an answer.
      texts: markers for which the tokenizer has no token of their own.

    >>> EndMarkers((2,)) | EndMarkers((2, 7), ("###",))
    EndMarkers(token_ids=(2, 7), texts=('###',))
    """

    token_ids: tuple[int, ...] = ()
    texts: tuple[str, ...] = ()

    def __or__(self, other: EndMarkers) -> EndMarkers:
        return EndMarkers(
            tuple(dict.fromkeys(self.token_ids + other.token_ids)),
            tuple(dict.fromkeys(self.texts + other.texts)),
        )

    def __bool__(self) -> bool:
        return bool(self.token_ids or self.texts)

    @classmethod
    def of(cls, texts: Iterable[str], tokenizer: Tokenizer) -> EndMarkers:
        """The markers with these texts, as tokens where the tokenizer has one for a text."""
        ids = token_ids(tokenizer)
        texts = list(dict.fromkeys(texts))
        return cls(
            tuple(ids[text] for text in texts if text in ids),
            tuple(text for text in texts if text not in ids),
        )

    def record(self) -> dict[str, list[Any]]:
        """The markers as JSON has them."""
        return {"token_ids": list(self.token_ids), "texts": list(self.texts)}

    @classmethod
    def of_record(cls, record: object) -> EndMarkers:
        """The markers of what `record` returned; none where nothing was recorded."""
        if not isinstance(record, Mapping):
            return cls()
        return cls(tuple(record.get("token_ids", ())), tuple(record.get("texts", ())))


def token_ids(tokenizer: Tokenizer) -> dict[str, int]:
    """The ids of the special and added tokens, by their texts."""
    ids = ((text, tokenizer.convert_tokens_to_ids(text)) for text in tokenizer.all_special_tokens)
    # For a text that is not in its vocabulary a tokenizer gives the id of another token, or None.
    known = {text: id for text, id in ids if tokenizer.convert_ids_to_tokens(id) == text}
    return {**known, **tokenizer.get_added_vocab()}


def markers_of(document: Document, tokenizer: Tokenizer) -> tuple[str, ...]:
    """The texts of the markers that end the answers of a document; see `Document`."""
    if document.add_special:
        return (str(tokenizer.eos_token),)
    return document.end_markers
