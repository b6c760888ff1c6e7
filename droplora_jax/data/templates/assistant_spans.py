"""Where in a rendered conversation the assistant speaks."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace

from droplora_jax.core.errors import InputError
from droplora_jax.data.formats.base import ASSISTANT, Turn
from droplora_jax.data.templates.base import shared_prefix
from droplora_jax.data.templates.jinja import Renderer, Span

_OTHER = "\u2042"  # words that stand in no conversation


def marked(renderer: Renderer, turns: Sequence[Turn], first: int) -> tuple[str, list[Span]]:
    """The rendering, and the spans that the template marks, to the end marker behind them.

    Raises:
      InputError: turns that are not to be learnt can't be told from the others.
    """
    whole, spans = renderer.marked(turns)
    said = [i for i, turn in enumerate(turns) if turn.role == ASSISTANT]
    if not all(turns[i].learnt for i in said) and len(spans) != len(said):
        raise InputError(
            f"data.template=chat: the chat template marks {len(spans)} places as generated, where "
            f"the {ASSISTANT} has {len(said)} messages: which of them has weight 0 can't be told"
        )
    so_far, ends = whole, spans
    if said[-1] < len(turns) - 1:
        so_far, ends = renderer.marked(turns[: said[-1] + 1])
    closing = so_far[ends[-1][1] :] if ends else ""
    full = [(start, _with_marker(renderer, whole, start, end, closing)) for start, end in spans]
    if len(spans) != len(said):
        return whole, full
    return whole, [span for span, i in zip(full, said, strict=True) if turns[i].learnt]


def compared(renderer: Renderer, turns: Sequence[Turn], first: int) -> tuple[str, list[Span]]:
    """The rendering, and the spans of the assistant's turns, read off other renderings.

    Raises:
      InputError: names a message that can't be found in the rendering.
    """
    whole = renderer.text(turns)
    spans: list[Span] = []
    for i, turn in enumerate(turns):
        if turn.role != ASSISTANT or not turn.learnt:
            continue
        so_far = whole if i == len(turns) - 1 else renderer.text(turns[: i + 1])
        span = _begun(renderer, turns, i, so_far, whole)
        span = span or _replaced(renderer, turns, i, so_far, whole)
        if span is None or (spans and span[0] < spans[-1][1]):
            raise InputError(
                f"data.template=chat: up to message {i + first} this chat template renders "
                "otherwise than within the whole conversation, so what to learn can't be told "
                "apart; mark what the assistant says in it with {% generation %}, or split the "
                "conversation into rows that end with that message"
            )
        spans.append(span)
    return whole, spans


def _begun(
    renderer: Renderer, turns: Sequence[Turn], i: int, so_far: str, whole: str
) -> Span | None:
    """A turn's span if the whole begins with the rendering of the conversation up to it."""
    if not whole.startswith(so_far):
        return None
    start = _start(renderer, turns[: i + 1], so_far)
    stripped = so_far.rstrip()  # the white space behind an end marker is not learnt
    end = len(stripped) if stripped.endswith(renderer.markers) else len(so_far)
    return None if start is None else (start, end)


def _start(renderer: Renderer, turns: Sequence[Turn], so_far: str) -> int | None:
    """Where the last turn's own words start in the rendering `so_far`, behind its header."""
    before = renderer.text(turns[:-1])
    prompt = renderer.text(turns[:-1], add_generation_prompt=True)
    if not so_far.startswith(prompt):
        return None
    if prompt != before:
        return len(prompt)
    # The template writes no generation prompt, so the header is what any other answer shares.
    # A space at its end belongs to the first word.
    other = renderer.text((*turns[:-1], Turn(ASSISTANT, _OTHER)))
    header = so_far[: shared_prefix(so_far, other)]
    return max(len(header.rstrip(" ")), len(prompt))


def _replaced(
    renderer: Renderer, turns: Sequence[Turn], i: int, so_far: str, whole: str
) -> Span | None:
    """A turn's span if putting other words in the place of its own changes these alone.

    Templates that leave the reasoning of earlier answers out render them otherwise later on.
    """
    turn, before, after = turns[i], turns[:i], turns[i + 1 :]
    other = replace(turn, content=_OTHER)
    silent = replace(other, calls=())
    start = shared_prefix(whole, renderer.text((*before, other, *after)))
    end = len(whole) - _shared_suffix(whole, renderer.text((*before, silent, *after)))
    closing = _shared_suffix(so_far, renderer.text((*before, silent)))
    words = whole[start:end].strip()
    names = (call["function"]["name"] for call in turn.calls)
    if not words or not all(name in words for name in names):
        return None
    if not turn.calls and not (turn.content or "").rstrip().endswith(words):
        return None
    return start, _with_marker(renderer, whole, start, end, so_far[len(so_far) - closing :])


def _with_marker(renderer: Renderer, text: str, start: int, end: int, closing: str) -> int:
    """The end of a span, or of the end marker behind it: what `closing` starts with."""
    if text[start:end].rstrip().endswith(renderer.markers):
        return end
    rest = closing.lstrip()
    marker = max((m for m in renderer.markers if rest.startswith(m)), key=len, default="")
    at = len(text) - len(text[end:].lstrip())
    return at + len(marker) if text.startswith(marker, at) and marker else end


def _shared_suffix(a: str, b: str) -> int:
    return shared_prefix(a[::-1], b[::-1])
