"""The tokenizer's own chat template; the assistant's turns are trained."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace

from droplora_jax.core.errors import InputError, raise_all
from droplora_jax.data.formats.base import Example, Turn
from droplora_jax.data.templates import assistant_spans, left_out
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
        text, answers = find(renderer, turns, example.first)
        raise_all(left_out.problems(renderer, turns, text, example.first))
    except Fails as error:
        raise InputError(_where_it_fails(renderer, turns, example.first, error)) from error
    pieces: list[Piece] = []
    done = 0
    for start, end, *_ in answers:
        pieces += Piece(text[done:start], False), Piece(text[start:end], True)
        done = end
    pieces.append(Piece(text[done:], False))
    return Document(
        tuple(piece for piece in pieces if piece.text),
        add_special=False,
        end_markers=tuple(dict.fromkeys(answer.marker for answer in answers)),
        prompted=all(answer.prompted for answer in answers),
    )


def prompt(example: Example, tokenizer: Tokenizer) -> Document:
    """A conversation that the assistant is to answer, with the template's prompt for generation.

    Raises:
      InputError: there is no chat template, it fails or leaves something out.
    """
    renderer = Renderer.of(tokenizer, example.tools)
    turns = _turns(example)
    try:
        text = assistant_spans.header(renderer, turns)
        marker = assistant_spans.end_marker(renderer, turns)
        raise_all(left_out.problems(renderer, turns, text, example.first))
    except Fails as error:
        raise InputError(_where_it_fails(renderer, turns, example.first, error)) from error
    return Document((Piece(text, False),), add_special=False, end_markers=(marker,) * bool(marker))


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
