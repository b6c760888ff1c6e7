"""What a template makes of an example."""

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
    """Text that is trained on or not."""

    text: str
    trained: bool


@dataclass(frozen=True)
class Document:
    """An example, written out.

    Attributes:
      pieces: its text, in order.
      add_special: every piece is tokenised by itself; BOS, if the tokenizer adds one, goes before
        and a trained EOS behind. Without it the text has all its special tokens already and is
        tokenised as one.
      split: where it is too long, it is split and never cut.
    """

    pieces: tuple[Piece, ...]
    add_special: bool = True
    split: bool = False

    def trained_on(self, which: str) -> Document:
        """The document with the pieces trained that `which`, one of `TRAIN_ON`, names."""
        trained = [i for i, piece in enumerate(self.pieces) if piece.trained]
        kept = {"responses": trained, "last": trained[-1:], "all": range(len(self.pieces))}[which]
        pieces = (replace(piece, trained=i in kept) for i, piece in enumerate(self.pieces))
        return replace(self, pieces=tuple(pieces))


TRAIN_ON = ("responses", "last", "all")
Template = Callable[[Example, Tokenizer], Document]


def one_exchange(example: Example, template: str) -> tuple[str, str]:
    """The prompt and the response of an example that has one of each.

    Raises:
      InputError: it is plain text, a longer conversation, or one with tools.
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
