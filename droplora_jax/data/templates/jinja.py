"""Renderings of conversations by the tokenizer's chat template."""

from __future__ import annotations

import json
import re
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from functools import cached_property
from typing import Any

from droplora_jax.core.errors import InputError
from droplora_jax.data.formats.base import Turn
from droplora_jax.data.record import Call, Function, WrittenFields
from droplora_jax.data.templates.base import Tokenizer

Span = tuple[int, int]  # start and end (exclusive) in the characters of a rendering

# Rows must not depend on the day. Llama 3's template falls back to this date.
DATE = "26 Jul 2024"


class Fails(InputError):
    """The chat template raises an error."""


@dataclass(frozen=True)
class Renderer:
    """The chat template of a tokenizer, with the tools of one conversation.

    Attributes:
      template: the Jinja source.
      markers: the texts of special and added tokens.
    """

    tokenizer: Tokenizer
    tools: Sequence[Call]
    template: str
    markers: tuple[str, ...]

    @classmethod
    def of(cls, tokenizer: Tokenizer, tools: Sequence[Call]) -> Renderer:
        if not tokenizer.chat_template:
            raise InputError(
                "data.template=chat: the tokenizer has no chat template; put a "
                "chat_template.jinja into its folder, or set data.template to alpaca or none"
            )
        template = tokenizer.get_chat_template(tools=[dict(tool) for tool in tools] or None)
        if "strftime_now" in template and "date_string" not in template:
            raise InputError(
                "data.template=chat: the chat template writes today's date (strftime_now), and "
                "the rows would change from day to day; write a date into it"
            )
        markers = (*tokenizer.all_special_tokens, *tokenizer.get_added_vocab())
        return cls(tokenizer, tools, template, markers)

    @property
    def has_marks(self) -> bool:
        """Whether the template marks what the assistant generates."""
        return re.search(r"\{%-?\s*generation\s*-?%\}", self.template) is not None

    @cached_property
    def marker_pattern(self) -> re.Pattern[str]:
        """Matches a marker; the longest where several begin at one place."""
        longest_first = sorted(filter(str.strip, self.markers), key=len, reverse=True)
        # Without any marker: a pattern that matches nothing.
        return re.compile("|".join(map(re.escape, longest_first)) or r"(?!)")

    def text(self, turns: Sequence[Turn], *, add_generation_prompt: bool = False) -> str:
        return self._rendered(turns, add_generation_prompt=add_generation_prompt)[0]

    def marked(self, turns: Sequence[Turn]) -> tuple[str, list[Span]]:
        """The text, and the spans of it that the template marks as generated."""
        return self._rendered(turns, return_assistant_tokens_mask=True)

    def _rendered(self, turns: Sequence[Turn], **options: bool) -> tuple[str, list[Span]]:
        """The text and the marked spans, in the first form of the messages that writes the calls.

        Where none does, it is the first form that the template takes.

        Raises:
          Fails: the template takes no form; this is the error of the first.
        """
        taken: tuple[str, list[Span]] | None = None
        failure: Fails | None = None
        for messages in _forms(turns):
            try:
                rendered = self._written(messages, **options)
                _check_arguments(rendered[0], turns)
            except Fails as error:
                failure = failure or error
                continue
            if _writes_calls(rendered[0], turns):
                return rendered
            taken = taken or rendered
        if taken is None:
            assert failure is not None  # there is at least one form
            raise failure
        return taken

    def _written(
        self, messages: list[dict[str, object]], **options: bool
    ) -> tuple[str, list[Span]]:
        # `apply_chat_template` calls this, but does not return the spans of characters.
        from transformers.utils import chat_template_utils

        render: Any = chat_template_utils.render_jinja_template  # its annotation says otherwise
        try:
            (text,), spans = render(
                [messages],
                tools=list(self.tools) or None,
                chat_template=self.template,
                **options,
                **self.tokenizer.special_tokens_map,
                date_string=DATE,
            )
        except Exception as error:  # a template is a program and may raise any error
            raise Fails(f"data.template=chat: the chat template fails ({error})") from error
        return text, spans[0] if spans else []


def _forms(turns: Sequence[Turn]) -> Iterator[list[dict[str, object]]]:
    """The forms in which the messages may be handed to a chat template, the most common first.

    Most templates write the arguments of calls as JSON themselves. Others join them with text, as
    they come from OpenAI's interface: these fail for objects, or write them as Python does. A call
    that stands alone has no content, a null, or an empty text, and templates take one or two of
    these.
    """
    yield [message(turn) for turn in turns]
    if not any(turn.calls for turn in turns):
        return
    yield [joined_message(turn) for turn in turns]
    if all(turn.content is not None for turn in turns if turn.calls):
        return
    for content in (None, ""):
        for written in (message, joined_message):
            yield [
                {**written(turn), "content": content}
                if turn.calls and turn.content is None
                else written(turn)
                for turn in turns
            ]


def _writes_calls(text: str, turns: Sequence[Turn]) -> bool:
    """Whether a rendering has the names of all calls."""
    return all(call["function"]["name"] in text for turn in turns for call in turn.calls)


def _check_arguments(text: str, turns: Sequence[Turn]) -> None:
    """Raise Fails if a rendering has a call's arguments as Python writes an object."""
    objects = [call["function"].get("arguments", {}) for turn in turns for call in turn.calls]
    as_json = {json.dumps(arguments, ensure_ascii=False) for arguments in objects}
    written = {repr(dict(arguments)) for arguments in objects} - as_json
    said = "".join(turn.content or "" for turn in turns)
    if any(text.count(python) > said.count(python) for python in written):
        raise Fails(
            "data.template=chat: the chat template writes the arguments of calls as Python does; "
            "it needs arguments | tojson"
        )


def message(turn: Turn) -> dict[str, object]:
    """A turn in the form of chat templates."""
    content = {} if turn.content is None else {"content": turn.content}
    calls = {"tool_calls": list(turn.calls)} if turn.calls else {}
    return {"role": turn.role, **content, **calls, **turn.keys}


def joined_message(turn: Turn) -> dict[str, object]:
    """The same, with the arguments of calls as JSON."""
    calls = [{**call, "function": _joined(call["function"])} for call in turn.calls]
    return message(turn) | ({"tool_calls": calls} if calls else {})


def _joined(function: Function) -> dict[str, object]:
    arguments = function.get("arguments", {})
    if isinstance(arguments, WrittenFields):
        return {**function, "arguments": arguments.text}
    return {**function, "arguments": json.dumps(arguments, ensure_ascii=False)}
