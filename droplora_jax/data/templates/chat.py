"""The tokenizer's own chat template, with the loss on what the assistant says."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace

import jinja2

from droplora_jax.data.formats.base import ASSISTANT, Example, Turn
from droplora_jax.data.templates.base import Document, Piece, Tokenizer, shared_prefix
from droplora_jax.errors import InputError

# A row must not depend on the day. Llama 3 writes this date where it doesn't know today's.
_DATE = "26 Jul 2024"


def render(example: Example, tokenizer: Tokenizer) -> Document:
    """The rendered conversation; every assistant turn is trained, to its end marker.

    Where a turn starts and ends is read off renderings of the conversation so far, so these must
    be prefixes of the whole.

    Raises:
      InputError: there is no chat template, it fails, or its renderings are no prefixes.
    """
    _check(tokenizer)
    turns = _turns(example)
    whole = _render(tokenizer, turns)
    pieces: list[Piece] = []
    done = 0
    for i, turn in enumerate(turns):
        if turn.role != ASSISTANT:
            continue
        so_far = _render(tokenizer, turns[: i + 1])
        start = _start(tokenizer, turns[: i + 1], so_far)
        if not whole.startswith(so_far) or start < done:
            _refuse(i)
        end = _end(tokenizer, so_far)
        pieces += Piece(whole[done:start], False), Piece(whole[start:end], True)
        done = end
    pieces.append(Piece(whole[done:], False))
    return Document(tuple(piece for piece in pieces if piece.text), add_special=False)


def _check(tokenizer: Tokenizer) -> None:
    template = str(tokenizer.chat_template or "")
    if not template:
        raise InputError(
            "data.template=chat: the tokenizer has no chat template; put a chat_template.jinja "
            "into its folder, or set data.template to alpaca or none"
        )
    if "strftime_now" in template and "date_string" not in template:
        raise InputError(
            "data.template=chat: the chat template writes today's date (strftime_now), and the "
            "rows would change from day to day; write a date into it"
        )


def _turns(example: Example) -> tuple[Turn, ...]:
    if not example.turns:
        raise InputError("data.template=chat needs a conversation; plain text goes with none")
    first, *rest = example.turns
    if first.role == ASSISTANT:
        raise InputError(f"the first message is the {ASSISTANT}'s: there is nothing to answer")
    if example.input:
        first = replace(first, content=f"{first.content}\n{example.input}")
    return (first, *rest)


def _start(tokenizer: Tokenizer, turns: Sequence[Turn], so_far: str) -> int:
    """Where the last turn's own words start in the rendering `so_far`, behind its header."""
    before = _render(tokenizer, turns[:-1])
    prompt = _render(tokenizer, turns[:-1], add_generation_prompt=True)
    if not so_far.startswith(prompt):
        _refuse(len(turns) - 1)
    if prompt != before:
        return len(prompt)
    # The template writes no generation prompt, so the header is what any other answer shares.
    # A space at its end belongs to the first word.
    other = "b" if turns[-1].content.lstrip().startswith("a") else "a"
    changed = _render(tokenizer, (*turns[:-1], Turn(ASSISTANT, other)))
    header = so_far[: shared_prefix(so_far, changed)]
    return max(len(header.rstrip(" ")), len(prompt))


def _end(tokenizer: Tokenizer, so_far: str) -> int:
    """Where the last turn ends: behind its end marker, without the white space that follows."""
    stripped = so_far.rstrip()
    markers = (*tokenizer.all_special_tokens, *tokenizer.get_added_vocab())
    return len(stripped) if stripped.endswith(markers) else len(so_far)


def _render(
    tokenizer: Tokenizer, turns: Sequence[Turn], *, add_generation_prompt: bool = False
) -> str:
    try:
        text = tokenizer.apply_chat_template(
            [{"role": turn.role, "content": turn.content} for turn in turns],
            tokenize=False,
            add_generation_prompt=add_generation_prompt,
            date_string=_DATE,
        )
    except (jinja2.TemplateError, ArithmeticError, LookupError, TypeError, ValueError) as error:
        raise InputError(f"data.template=chat: the chat template fails ({error})") from error
    return str(text)


def _refuse(i: int) -> None:
    raise InputError(
        f"data.template=chat: up to message {i + 1} this chat template renders otherwise than "
        "within the whole conversation, so what to learn can't be told apart; split the "
        "conversation into rows that end with that message, or use a simpler template"
    )
