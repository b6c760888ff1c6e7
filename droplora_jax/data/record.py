"""The types of a record, as a file holds it."""

from __future__ import annotations

from collections.abc import Mapping
from typing import NotRequired, TypedDict

Fields = Mapping[str, object]  # a JSON object: text, numbers, lists and further objects by key


class WrittenFields(dict[str, object]):
    """An object that stands as JSON in a record, and that text."""

    def __init__(self, fields: Fields, text: str) -> None:
        super().__init__(fields)
        self.text = text


class Function(TypedDict):
    """A function that the assistant may call, or calls; a tool has further keys."""

    name: str
    arguments: NotRequired[Fields]


class Call(TypedDict):
    """A tool, or a call of one, in OpenAI's form."""

    type: NotRequired[str]
    id: NotRequired[str]
    function: Function
