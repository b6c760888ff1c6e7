"""The tokenizer's own chat template; the assistant's turns are trained."""

from __future__ import annotations

import re
from collections.abc import Sequence
from dataclasses import replace

from droplora_jax.core.errors import InputError
from droplora_jax.data.formats.base import ASSISTANT, Example, Turn
from droplora_jax.data.templates import assistant_spans
from droplora_jax.data.templates.base import Document, Piece, Tokenizer
from droplora_jax.data.templates.jinja import Fails, Renderer


def render(example: Example, tokenizer: Tokenizer) -> Document:
    """The rendered conversation; every turn of the assistant is trained, with its end marker.

    Where the chat template marks with `{% generation %}` what the assistant generates, these spans
    are trained; else they are found by comparing renderings.

    Raises:
      InputError: there is no chat template, it fails or leaves something out, or the assistant's
        turns can't be found in the rendering.
    """
    renderer = Renderer.of(tokenizer, example.tools)
    turns = _turns(example)
    find = assistant_spans.marked if renderer.has_marks else assistant_spans.compared
    try:
        text, spans = find(renderer, turns, example.first)
    except Fails as error:
        raise InputError(_where_it_fails(renderer, turns, example.first, error)) from error
    _check_written(example, text)
    pieces: list[Piece] = []
    done = 0
    for start, end in spans:
        pieces += Piece(text[done:start], False), Piece(text[start:end], True)
        done = end
    pieces.append(Piece(text[done:], False))
    return Document(tuple(piece for piece in pieces if piece.text), add_special=False)


def _turns(example: Example) -> tuple[Turn, ...]:
    if not example.turns:
        raise InputError("data.template=chat needs a conversation; plain text goes with none")
    first, *rest = example.turns
    if example.input:
        first = replace(first, content=f"{first.content}\n{example.input}")
    return (first, *rest)


def _where_it_fails(renderer: Renderer, turns: Sequence[Turn], first: int, error: Fails) -> str:
    """The error, and the message after the longest beginning that the template renders."""
    for count in range(len(turns) - 1, 0, -1):
        try:
            renderer.text(turns[:count])
        except Fails:
            continue
        roles = ", ".join(turn.role for turn in turns[: count + 1])
        return f"message {count + first}: {error}; the roles up to it are {roles}"
    return str(error)


def _check_written(example: Example, text: str) -> None:
    """Raise InputError for a tool, call or message that the template leaves out silently."""
    names = [("tool", tool["function"]["name"]) for tool in example.tools]
    for number, turn in enumerate(example.turns, example.first):
        names += [(f"call in message {number}", call["function"]["name"]) for call in turn.calls]
        if turn.role != ASSISTANT:
            words = re.findall(r"\w+", turn.content or "", re.ASCII)
            names += [(f"message {number} of the {turn.role}", max(words, key=len, default=""))]
    for what, name in names:
        if name not in text:
            raise InputError(
                f"data.template=chat: the chat template does not write the {what} ({name!r}); it "
                "needs one that does, in the tokenizer's chat_template.jinja"
            )
