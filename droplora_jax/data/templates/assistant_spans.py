"""The spans of a rendered conversation that the assistant says."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace

from droplora_jax.core.errors import InputError
from droplora_jax.data.formats.base import ASSISTANT, Turn
from droplora_jax.data.templates.base import shared_prefix
from droplora_jax.data.templates.jinja import Renderer, Span

_OTHER = "\u2042"  # a text that no conversation contains


def marked(renderer: Renderer, turns: Sequence[Turn], first: int) -> tuple[str, list[Span]]:
    """The rendering, and the spans that the template marks, each with its end marker.

    Raises:
      InputError: some turns are not to be trained, and the marks do not show which.
    """
    full_text, spans = renderer.marked(turns)
    assistant = [i for i, turn in enumerate(turns) if turn.role == ASSISTANT]
    if not all(turns[i].learnt for i in assistant) and len(spans) != len(assistant):
        raise InputError(
            f"data.template=chat: the chat template marks {len(spans)} places as generated, where "
            f"the {ASSISTANT} has {len(assistant)} messages: which of them has weight 0 can't be "
            "told"
        )
    prefix_text, ends = full_text, spans
    if assistant[-1] < len(turns) - 1:
        prefix_text, ends = renderer.marked(turns[: assistant[-1] + 1])
    closing = prefix_text[ends[-1][1] :] if ends else ""
    full = [(start, _with_marker(renderer, full_text, start, end, closing)) for start, end in spans]
    if len(spans) != len(assistant):
        return full_text, full
    return full_text, [span for span, i in zip(full, assistant, strict=True) if turns[i].learnt]


def compared(renderer: Renderer, turns: Sequence[Turn], first: int) -> tuple[str, list[Span]]:
    """The rendering, and the spans of the assistant's turns, found by comparing renderings.

    Raises:
      InputError: a turn can't be found in the rendering; names the message.
    """
    full_text = renderer.text(turns)
    spans: list[Span] = []
    for i, turn in enumerate(turns):
        if turn.role != ASSISTANT or not turn.learnt:
            continue
        prefix_text = full_text if i == len(turns) - 1 else renderer.text(turns[: i + 1])
        span = _begun(renderer, turns, i, prefix_text, full_text)
        span = span or _replaced(renderer, turns, i, prefix_text, full_text)
        if span is None or (spans and span[0] < spans[-1][1]):
            raise InputError(
                f"data.template=chat: up to message {i + first} this chat template renders "
                "otherwise than within the whole conversation, so what to learn can't be told "
                "apart; mark what the assistant says in it with {% generation %}, or split the "
                "conversation into rows that end with that message"
            )
        spans.append(span)
    return full_text, spans


def _begun(
    renderer: Renderer, turns: Sequence[Turn], i: int, prefix_text: str, full_text: str
) -> Span | None:
    """A turn's span if the rendering begins with that of the conversation up to the turn."""
    if not full_text.startswith(prefix_text):
        return None
    start = _start(renderer, turns[: i + 1], prefix_text)
    stripped = prefix_text.rstrip()  # white space after an end marker is not trained
    end = len(stripped) if stripped.endswith(renderer.markers) else len(prefix_text)
    return None if start is None else (start, end)


def _start(renderer: Renderer, turns: Sequence[Turn], prefix_text: str) -> int | None:
    """Where the last turn's own words start in the rendering `prefix_text`, behind its header."""
    before = renderer.text(turns[:-1])
    prompt = renderer.text(turns[:-1], add_generation_prompt=True)
    if not prefix_text.startswith(prompt):
        return None
    if prompt != before:
        return len(prompt)
    # The template writes no generation prompt, so the header is the prefix that two answers share.
    # A space at its end belongs to the first word.
    other = renderer.text((*turns[:-1], Turn(ASSISTANT, _OTHER)))
    header = prefix_text[: shared_prefix(prefix_text, other)]
    return max(len(header.rstrip(" ")), len(prompt))


def _replaced(
    renderer: Renderer, turns: Sequence[Turn], i: int, prefix_text: str, full_text: str
) -> Span | None:
    """A turn's span if another content for the turn changes the rendering nowhere else.

    This finds turns that later turns change, as in templates that drop earlier reasoning.
    """
    turn, before, after = turns[i], turns[:i], turns[i + 1 :]
    other = replace(turn, content=_OTHER)
    silent = replace(other, calls=())
    start = shared_prefix(full_text, renderer.text((*before, other, *after)))
    end = len(full_text) - _shared_suffix(full_text, renderer.text((*before, silent, *after)))
    closing = _shared_suffix(prefix_text, renderer.text((*before, silent)))
    words = full_text[start:end].strip()
    names = (call["function"]["name"] for call in turn.calls)
    if not words or not all(name in words for name in names):
        return None
    if not turn.calls and not (turn.content or "").rstrip().endswith(words):
        return None
    return start, _with_marker(
        renderer, full_text, start, end, prefix_text[len(prefix_text) - closing :]
    )


def _with_marker(renderer: Renderer, text: str, start: int, end: int, closing: str) -> int:
    """The end of a span together with its end marker, if `closing` starts with one."""
    if text[start:end].rstrip().endswith(renderer.markers):
        return end
    rest = closing.lstrip()
    marker = max((m for m in renderer.markers if rest.startswith(m)), key=len, default="")
    at = len(text) - len(text[end:].lstrip())
    return at + len(marker) if text.startswith(marker, at) and marker else end


def _shared_suffix(a: str, b: str) -> int:
    return shared_prefix(a[::-1], b[::-1])
