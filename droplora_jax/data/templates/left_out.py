"""What a conversation says and the chat template does not write."""

from __future__ import annotations

import re
from collections.abc import Iterator, Sequence
from dataclasses import replace

from droplora_jax.data.formats.base import ASSISTANT, USER, Turn
from droplora_jax.data.templates.assistant_spans import OTHER
from droplora_jax.data.templates.jinja import Fails, Renderer

# Keys of a message that data sets and chat templates have for the reasoning before an answer.
REASONING_KEYS = ("reasoning_content", "reasoning", "thinking")
REASONING_END = "</think>"  # what precedes it in an answer's content is its reasoning
ADD_IT = "it needs one that does, in the tokenizer's chat_template.jinja"


def problems(renderer: Renderer, turns: Sequence[Turn], text: str, first: int) -> Iterator[str]:
    """A sentence for everything that is missing in the rendering `text` of the turns.

    Reasoning in answers before the last question may be left out, as many templates mean to.

    Args:
      first: the number of the first turn among the record's messages.
    """
    yield from _not_written(renderer, turns, text, first)
    asked = max((i for i, turn in enumerate(turns) if turn.role == USER), default=-1)
    for i, turn in enumerate(turns):
        if turn.role == ASSISTANT and turn.learnt:
            yield from _answer(renderer, turns, i, text, first)
            if i > asked:
                yield from _reasoning(renderer, turns, i, text, first)


def _not_written(renderer: Renderer, turns: Sequence[Turn], text: str, first: int) -> Iterator[str]:
    """The tools, the calls, and the messages that are not the assistant's."""
    names: list[tuple[str, str]] = []
    for number, turn in enumerate(turns, first):
        names += [(f"call in message {number}", call["function"]["name"]) for call in turn.calls]
        if turn.role != ASSISTANT:
            words = re.findall(r"\w+", turn.content or "", re.ASCII)
            names += [(f"message {number} of the {turn.role}", max(words, key=len, default=""))]
    missing = [("tool", name) for name in _tools_left_out(renderer, turns, text)]
    missing += [(what, name) for what, name in names if name not in text]
    for what, name in missing:
        yield (
            f"data.template=chat: the chat template does not write the {what} ({name!r}); {ADD_IT}"
        )


def _tools_left_out(renderer: Renderer, turns: Sequence[Turn], text: str) -> list[str]:
    """The names of the tools that the template does not write.

    A name that also stands in a call or a message is written more often than without the tools.
    """
    names = [tool["function"]["name"] for tool in renderer.tools]
    said = "".join(turn.content or "" for turn in turns)
    called = {call["function"]["name"] for turn in turns for call in turn.calls}
    if not any(name in said or name in called for name in names):
        return [name for name in names if name not in text]
    try:
        without = replace(renderer, tools=()).text(turns)
    except Fails:  # a template that can't do without tools writes them
        without = ""
    return [name for name in names if text.count(name) <= without.count(name)]


def _answer(
    renderer: Renderer, turns: Sequence[Turn], i: int, text: str, first: int
) -> Iterator[str]:
    """The assistant's answer, without its reasoning."""
    words = (turns[i].content or "").rpartition(REASONING_END)[2].strip()
    if not words or (words in text and not turns[i].calls):
        return
    if not _writes(renderer, turns, i, content=OTHER):
        beside = " beside its calls" if turns[i].calls else ""
        yield (
            f"data.template=chat: the chat template does not write the content of message "
            f"{i + first}{beside} ({words!r:.40}), so it would not be learnt; {ADD_IT}, or take "
            "the content out"
        )


def _reasoning(
    renderer: Renderer, turns: Sequence[Turn], i: int, text: str, first: int
) -> Iterator[str]:
    """The reasoning of an answer to the last question, in its content or under a key."""
    turn = turns[i]
    content = turn.content or ""
    thought, _, answer = content.rpartition(REASONING_END)
    unsaid = bool(thought.replace("<think>", "").strip()) and content.strip() not in text
    if unsaid and not _writes(renderer, turns, i, content=_thought(answer)):
        yield _unwritten(renderer, turns, i, f"of message {i + first}, up to {REASONING_END}")
    for key in REASONING_KEYS:
        value = turn.keys.get(key)
        unsaid = isinstance(value, str) and bool(value.strip()) and value.strip() not in text
        if unsaid and not _writes(renderer, turns, i, **{key: OTHER}):
            yield _unwritten(renderer, turns, i, f"of message {i + first}, its key {key}")


def _unwritten(renderer: Renderer, turns: Sequence[Turn], i: int, what: str) -> str:
    """The error, with every other place of the reasoning that the template does write."""
    answer = (turns[i].content or "").rpartition(REASONING_END)[2]
    keys = [
        key for key in REASONING_KEYS if _writes(renderer, turns, i, content=answer, **{key: OTHER})
    ]
    places = [f"under the key {key}" for key in keys]
    if _writes(renderer, turns, i, content=_thought(answer)):
        places.append(f"in the content, as <think>...{REASONING_END}")
    way_out = f"write it {' or '.join(places)}" if places else ADD_IT
    return (
        f"data.template=chat: the chat template leaves out the reasoning {what}, so only the bare "
        f"answer would be learnt; {way_out}, or take the reasoning out"
    )


def _thought(answer: str) -> str:
    return f"<think>\n{OTHER}\n{REASONING_END}\n\n{answer.lstrip()}"


def _writes(renderer: Renderer, turns: Sequence[Turn], i: int, **changes: str) -> bool:
    """Whether a turn with other keys brings the text `OTHER` into the rendering."""
    content = changes.pop("content", turns[i].content)
    kept = {key: value for key, value in turns[i].keys.items() if key not in REASONING_KEYS}
    turn = replace(turns[i], content=content, keys={**kept, **changes})
    try:
        return OTHER in renderer.text((*turns[:i], turn, *turns[i + 1 :]))
    except Fails:
        return False
