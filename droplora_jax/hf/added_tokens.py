"""Special tokens that are added to a base: their ids, and which rows of its tables they take."""

from __future__ import annotations

import copy
from collections.abc import Sequence
from dataclasses import replace

from droplora_jax.core.errors import InputError
from droplora_jax.data.templates.base import Tokenizer
from droplora_jax.hf.tokenizer import add_special_tokens
from droplora_jax.models.config import AddedTokens, ModelConfig
from droplora_jax.models.families import FAMILIES

ENDS = ("embed.embedding", "lm_head.kernel")


def added_tokens(
    texts: Sequence[str], tokenizer: Tokenizer, shape: ModelConfig
) -> AddedTokens | None:
    """What a base gets for these tokens; None if its tokenizer has all of them.

    Raises:
      InputError: an empty text, or a tokenizer that gives a token an id that is not its own.
    """
    if not all(texts):
        raise InputError(f"add_tokens={list(texts)!r}: a token is a text that is not empty")
    present: dict[str, int] = tokenizer.get_vocab()
    added = tokenizer.get_added_vocab()
    new = [text for text in dict.fromkeys(texts) if text not in added]
    if not new:
        return None
    larger = copy.deepcopy(tokenizer)
    add_special_tokens(larger, new)
    ids: dict[str, int] = larger.get_vocab()
    further = sorted(id for text, id in ids.items() if text not in present)
    if further and further[0] <= max(present.values()):
        raise InputError(
            f"add_tokens={list(texts)!r}: the tokenizer would give a new token the id "
            f"{further[0]}, and ids up to {max(present.values())} are taken: there are gaps in "
            "its vocabulary, and no token can be added"
        )
    first = min([shape.vocab_size, *further[:1]])
    stop = further[-1] + 1 if further else first
    return AddedTokens(tuple(new), _tables(shape), first, stop)


def _tables(shape: ModelConfig) -> tuple[str, ...]:
    """The tensors of embedding and head; the file of a tied base may hold either or both."""
    names = FAMILIES[shape.family].tensor_names(replace(shape, tie_embeddings=False))
    return tuple(names[path].pattern for path in ENDS)
