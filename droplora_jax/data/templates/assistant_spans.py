"""The spans of a rendered conversation that the assistant says, each with what ends it.

The closing of a turn is what the template writes behind the turn's own words. It is found by
rendering the turn with other words, so that words which look like a marker (an answer that ends in
`</answer>`, a call that ends in `</tool_call>`) are never taken for it.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from typing import NamedTuple

from droplora_jax.core.errors import InputError
from droplora_jax.data.formats.base import ASSISTANT, USER, Turn
from droplora_jax.data.templates.base import shared_prefix
from droplora_jax.data.templates.jinja import Fails, Renderer, Span

OTHER = "\u2042"  # a text that no conversation contains


class Answer(NamedTuple):
    """Where a turn of the assistant is in a rendering.

    Attributes:
      start, end: of what is trained, with the end marker.
      marker: the text of the end marker; empty where the template writes none.
      prompted: whether it is preceded by the template's own prompt for generation.
    """

    start: int
    end: int
    marker: str
    prompted: bool = True


def marked(renderer: Renderer, turns: Sequence[Turn], first: int) -> tuple[str, list[Answer]]:
    """The rendering, and the spans that the template marks, each with its end marker.

    Raises:
      InputError: some turns are not to be trained, and the marks do not show which.
    """
    full_text, spans = renderer.marked(turns)
    assistant = [i for i, turn in enumerate(turns) if turn.role == ASSISTANT]
    if len(spans) != len(assistant):
        if not all(turns[i].learnt for i in assistant):
            raise InputError(
                f"data.template=chat: the chat template marks {len(spans)} places as generated, "
                f"where the {ASSISTANT} has {len(assistant)} messages: which of them has weight 0 "
                "can't be told"
            )
        # Several places belong to one message, and the last of them ends it.
        return full_text, [
            _marked_answer(renderer, turns[: assistant[-1] + 1], full_text, span) for span in spans
        ]
    return full_text, [
        _marked_answer(renderer, turns[: i + 1], full_text, span)
        for span, i in zip(spans, assistant, strict=True)
        if turns[i].learnt
    ]


def _marked_answer(renderer: Renderer, turns: Sequence[Turn], full_text: str, span: Span) -> Answer:
    """A span that the template marks, extended by the end marker where the marks leave it out.

    Args:
      turns: the conversation up to the turn that the span belongs to.
    """
    start, end = span
    prefix_text, marks = renderer.marked(turns)
    closing = _closing(renderer, turns, prefix_text)
    # The part of the closing that the template itself has marked.
    inside = closing[: max(marks[-1][1] - (len(prefix_text) - len(closing)), 0)] if marks else ""
    if (marker := _first_marker(renderer, inside)) and full_text[:end].endswith(inside):
        return Answer(start, end, marker)
    marker = _first_marker(renderer, closing[len(inside) :])
    at = len(full_text) - len(full_text[end:].lstrip())
    if marker and full_text.startswith(marker, at):
        return Answer(start, at + len(marker), marker)
    return _until_next_marker(renderer, turns[:-1], full_text, Answer(start, end, ""))


def compared(renderer: Renderer, turns: Sequence[Turn], first: int) -> tuple[str, list[Answer]]:
    """The rendering, and the spans of the assistant's turns, found by comparing renderings.

    Raises:
      InputError: a turn can't be found in the rendering; names the message.
    """
    full_text = renderer.text(turns)
    answers: list[Answer] = []
    closing = ""
    for i, turn in enumerate(turns):
        if turn.role != ASSISTANT or not turn.learnt:
            continue
        prefix_text = full_text if i == len(turns) - 1 else renderer.text(turns[: i + 1])
        closing = _closing(renderer, turns[: i + 1], prefix_text, likely=closing)
        answer = _begun(renderer, turns[: i + 1], prefix_text, full_text, closing)
        if answer is None and (
            replaced := _replaced(renderer, turns, i, prefix_text, full_text, closing)
        ):
            # A last answer that does not begin where the prompt ends.
            answer = replaced._replace(prompted=prefix_text != full_text)
        if answer is None or (answers and answer.start < answers[-1].end):
            raise InputError(
                f"data.template=chat: up to message {i + first} this chat template renders "
                "otherwise than within the whole conversation, so what to learn can't be told "
                "apart; mark what the assistant says in it with {% generation %}, or split the "
                "conversation into rows that end with that message"
            )
        answers.append(_until_next_marker(renderer, turns[:i], full_text, answer))
    return full_text, answers


def header(renderer: Renderer, turns: Sequence[Turn]) -> str:
    """What the template writes before the words of the assistant's next turn.

    It is the template's own prompt for generation. Where the template has none, it is what two
    answers begin with in common; a space at its end belongs to the first word.
    """
    before = renderer.text(turns)
    prompt = renderer.text(turns, add_generation_prompt=True)
    if prompt != before:
        return prompt
    one, other = (renderer.text((*turns, Turn(ASSISTANT, words))) for words in ("a", OTHER))
    common = one[: shared_prefix(one, other)].rstrip(" ")
    return max(common, prompt, key=len)


def end_marker(renderer: Renderer, turns: Sequence[Turn]) -> str:
    """The marker that ends the assistant's next turn; empty where the template writes none."""
    answered = (*turns, Turn(ASSISTANT, OTHER))
    text = renderer.text(answered)
    closing = text.rpartition(OTHER)[2] if OTHER in text else ""
    return _marker(renderer, _ending(renderer, answered, text, closing))


def _closing(renderer: Renderer, turns: Sequence[Turn], prefix_text: str, likely: str = "") -> str:
    """What the template writes behind the words of the last of these turns.

    Args:
      prefix_text: the rendering of the turns.
      likely: the closing of another turn, which saves a rendering where it is that of this one.
    """
    *before, turn = turns
    if likely and not turn.calls and prefix_text.endswith((turn.content or "").rstrip() + likely):
        return likely
    silent = renderer.text((*before, replace(turn, content=OTHER, calls=())))
    start = _before_marker(renderer, prefix_text, _shared_suffix(prefix_text, silent))
    closing = prefix_text[start:]
    if turn.calls and not closing.strip() and _first_marker(renderer, silent.rpartition(OTHER)[2]):
        # Behind a call the template has another marker than behind an answer.
        words = prefix_text[:start].rstrip()
        markers = [m[0] for m in renderer.marker_pattern.finditer(words) if m.end() == len(words)]
        return prefix_text[len(words) - len("".join(markers)) :]
    return closing


def _before_marker(renderer: Renderer, text: str, suffix: int) -> int:
    """Where the last `suffix` characters of a text begin; before a marker that they would cut.

    Two markers may end alike: `<|eom_id|>` behind a call and `<|eot_id|>` behind an answer.
    """
    start = len(text) - suffix
    cut = (m.start() for m in renderer.marker_pattern.finditer(text) if m.start() < start < m.end())
    return next(cut, start)


def _until_next_marker(
    renderer: Renderer, before: Sequence[Turn], full_text: str, answer: Answer
) -> Answer:
    """The answer with the marker that follows it, where that of its own rendering is not there.

    Some templates end the last answer with another marker than those before it, and some end an
    answer with the marker of the next turn's role. The marker that begins an answer ends none; one
    that another marker follows ends the question before it.
    """
    at = len(full_text) - len(full_text[answer.end :].lstrip())
    if answer.marker or not (match := renderer.marker_pattern.match(full_text, at)):
        return answer
    opening = header(renderer, before).removeprefix(renderer.text(before)).lstrip()
    behind = opening.removeprefix(match[0])
    if behind != opening and not renderer.marker_pattern.match(behind.lstrip()):
        return answer
    return answer._replace(end=match.end(), marker=match[0])


def _begun(
    renderer: Renderer, turns: Sequence[Turn], prefix_text: str, full_text: str, closing: str
) -> Answer | None:
    """The last turn, if the rendering begins with that of the conversation up to it."""
    begin = header(renderer, turns[:-1])
    if not (full_text.startswith(prefix_text) and prefix_text.startswith(begin)):
        return None
    words_end = len(prefix_text) - len(closing)
    ending = _ending(renderer, turns, prefix_text, closing)
    return Answer(len(begin), words_end + len(ending), _marker(renderer, ending))


def _replaced(
    renderer: Renderer,
    turns: Sequence[Turn],
    i: int,
    prefix_text: str,
    full_text: str,
    closing: str,
) -> Answer | None:
    """A turn's span if another content for the turn changes the rendering nowhere else.

    This finds turns that later turns change, as in templates that drop earlier reasoning.
    """
    turn, before, after = turns[i], turns[:i], turns[i + 1 :]
    other = replace(turn, content=OTHER)
    silent = replace(other, calls=())
    start = shared_prefix(full_text, renderer.text((*before, other, *after)))
    silent_text = renderer.text((*before, silent, *after))
    end = _before_marker(renderer, full_text, _shared_suffix(full_text, silent_text))
    words = full_text[start:end].strip()
    names = (call["function"]["name"] for call in turn.calls)
    if not words or not all(name in words for name in names):
        return None
    if not turn.calls and not (turn.content or "").rstrip().endswith(words):
        return None
    ending = _ending(renderer, turns[: i + 1], prefix_text, closing)
    marker = _marker(renderer, ending)
    # The last turn may be closed otherwise than one with turns behind it.
    until_marker = ending[: ending.find(marker) + len(marker)] if marker else ""
    for written in (ending, until_marker, until_marker.lstrip()):
        if full_text.startswith(written, end):
            return Answer(start, end + len(written), marker if written else "")
    return Answer(start, end, "")


def _ending(renderer: Renderer, turns: Sequence[Turn], prefix_text: str, closing: str) -> str:
    """The part of a closing that is trained, with which the last of these turns ends.

    It is neither white space behind an end marker, nor the prompt for the next answer, which some
    templates write behind every message, whether they are asked for it or not.
    """
    stripped = closing.rstrip()
    marker = renderer.marker_pattern.search(closing)
    if stripped and not (marker and marker.end() == len(stripped)):
        length = _before_prompt(renderer, turns, prefix_text, closing)
        if length < len(closing):
            return closing[: marker.end() if marker and marker.end() <= length else length]
    return stripped if stripped.endswith(renderer.markers) else closing


def _before_prompt(
    renderer: Renderer, turns: Sequence[Turn], prefix_text: str, closing: str
) -> int:
    """The length of a closing without the prompt that a template writes behind every message."""
    before = renderer.text(turns[:-1])
    if before != renderer.text(turns[:-1], add_generation_prompt=True):
        return len(closing)
    try:
        followed = renderer.text((*turns, Turn(USER, OTHER)))
    except Fails:
        return len(closing)
    length = shared_prefix(prefix_text, followed) - (len(prefix_text) - len(closing))
    return length if length >= 0 and before.endswith(closing[length:]) else len(closing)


def _marker(renderer: Renderer, ending: str) -> str:
    """The end marker in an ending: its token, or its text where it has no token."""
    return _first_marker(renderer, ending) or ending.strip()


def _first_marker(renderer: Renderer, text: str) -> str:
    match = renderer.marker_pattern.search(text)
    return match[0] if match else ""


def _shared_suffix(a: str, b: str) -> int:
    return shared_prefix(a[::-1], b[::-1])
