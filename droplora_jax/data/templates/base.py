"""The contract of a template, and the document that it makes of an example."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, TypeAlias

from droplora_jax.core.errors import InputError
from droplora_jax.data.formats.base import ASSISTANT, USER, Example

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase as Tokenizer
else:
    Tokenizer: TypeAlias = object


@dataclass(frozen=True)
class Piece:
    """A text, and whether it is trained on."""

    text: str
    trained: bool


@dataclass(frozen=True)
class Document:
    """An example as text.

    Attributes:
      pieces: the text, in order.
      add_special: if true, every piece is tokenised by itself, BOS goes before the first (if the
        tokenizer adds one) and a trained EOS after the last. If false, the text contains all its
        special tokens and is tokenised at once.
      split: whether a text that is too long is split instead of cut.
      end_markers: the texts that end the assistant's answers, where `add_special` is false; an
        empty one where the template writes nothing that ends an answer.
      prompted: whether every answer is preceded by the prompt that the template has for one.
    """

    pieces: tuple[Piece, ...]
    add_special: bool = True
    split: bool = False
    end_markers: tuple[str, ...] = ()
    prompted: bool = True

    def trained_on(self, which: str) -> Document:
        """The document with those pieces trained that `which`, one of `TRAIN_ON`, names."""
        trained = [i for i, piece in enumerate(self.pieces) if piece.trained]
        kept = {"responses": trained, "last": trained[-1:], "all": range(len(self.pieces))}[which]
        pieces = (replace(piece, trained=i in kept) for i, piece in enumerate(self.pieces))
        return replace(self, pieces=tuple(pieces))


TRAIN_ON = ("responses", "last", "all")

# The contract of a template: a pure function that writes out an example of any format, and says of
# each piece of text whether it is trained on. It reads of the tokenizer only its chat template and
# special tokens, and raises an InputError for an example that it can't write out completely.
Template = Callable[[Example, Tokenizer], Document]


def one_exchange(example: Example, template: str) -> tuple[str, str]:
    """The prompt and the response of an example that has one of each.

    Raises:
      InputError: the example is plain text, a longer conversation, or one with tools.
    """
    roles = [turn.role for turn in example.turns]
    if not roles:
        raise InputError(f"data.template={template} needs a prompt; plain text goes with none")
    if example.tools or any(turn.calls for turn in example.turns):
        raise InputError(
            f"data.template={template} has no place for tools; data.template=chat has, where the "
            "tokenizer's chat template does"
        )
    if roles == [USER, ASSISTANT]:
        return example.turns[0].content or "", example.turns[1].content or ""
    raise InputError(
        f"data.template={template} takes one message of the {USER} and one of the {ASSISTANT}, "
        f"and here they are from {', '.join(roles)}; data.template=chat takes any"
    )


def shared_prefix(a: str, b: str) -> int:
    """How many characters two texts begin with in common."""
    differ = (i for i, (x, y) in enumerate(zip(a, b, strict=False)) if x != y)
    return next(differ, min(len(a), len(b)))
