"""Tools, and the assistant's calls of them, in the form of chat templates."""

from __future__ import annotations

import json
from collections.abc import Sequence
from typing import cast

from droplora_jax.core.errors import InputError
from droplora_jax.data.formats.base import check_unicode
from droplora_jax.data.record import Call, Fields, WrittenFields

# Keys of JSON Schema under which null is a value.
_VALUES = ("default", "const", "enum", "examples")


def tools_of(value: object) -> tuple[Call, ...]:
    """Tools in the form of chat templates, from a list or its JSON.

    A bare {"name", ...} is wrapped as {"type": "function", "function": ...}. Keys with null, which
    mean nothing in a description, are left out.
    """
    return tuple(
        _function("tools", without_nulls(tool), number)
        for number, tool in enumerate(_listed("tools", value), 1)
    )


def calls_of(key: str, value: object) -> tuple[Call, ...]:
    """Calls in the form of chat templates, from an object, a list of objects, or JSON of either.

    Arguments that are given as JSON become objects that remember it, and no arguments an empty one.
    """
    calls = (_function(key, call, number) for number, call in enumerate(_listed(key, value), 1))
    return tuple(_call(key, call) for call in calls)


def declared_calls(calls: Sequence[Call], tools: Sequence[Call]) -> tuple[Call, ...]:
    """The calls without null for arguments that the tool does not have.

    Such nulls come from tables, in which all calls have the arguments of all tools, also by way of
    JSON. Where an argument may be null, its tool declares it.
    """
    declared = {tool["function"]["name"]: _arguments(tool) for tool in tools}
    return tuple(_declared(call, declared.get(call["function"]["name"])) for call in calls)


def _arguments(tool: Call) -> Fields | None:
    """The arguments that a tool declares; None if it declares none in JSON Schema."""
    function: Fields = tool["function"]
    parameters = function.get("parameters")
    properties = parameters.get("properties") if isinstance(parameters, dict) else None
    return properties if isinstance(properties, dict) else None


def _declared(call: Call, declared: Fields | None) -> Call:
    arguments = call["function"].get("arguments", {})
    if declared is None or isinstance(arguments, WrittenFields):
        return call
    kept = {k: value for k, value in arguments.items() if value is not None or k in declared}
    return {**call, "function": {**call["function"], "arguments": kept}}


def without_nulls(value: object) -> object:
    """A JSON Schema, and what is around it, without keys whose value is null."""
    if isinstance(value, list):
        return [without_nulls(item) for item in value]
    if not isinstance(value, dict):
        return value
    return {
        key: item if key in _VALUES else without_nulls(item)
        for key, item in value.items()
        if item is not None or key in _VALUES
    }


def _listed(key: str, value: object) -> list[object]:
    if value is None or value == "":
        return []
    if isinstance(value, str):
        value = _parsed(key, value)
    check_unicode(key, json.dumps(value, ensure_ascii=False))
    return value if isinstance(value, list) else [value]


def _function(key: str, value: object, number: int) -> Call:
    if isinstance(value, dict):
        value = {key: item for key, item in value.items() if item is not None}
    if isinstance(value, dict) and "function" not in value and "name" in value:
        value = {"type": "function", "function": value}
    function = value.get("function") if isinstance(value, dict) else None
    if not isinstance(function, dict) or not isinstance(function.get("name"), str):
        raise InputError(
            f"{key}: number {number} must be an object with a function that has a name, is "
            f"{value!r:.60}"
        )
    return cast(Call, value)


def _call(key: str, call: Call) -> Call:
    function = call["function"]
    written: object = function.get("arguments")
    arguments = {} if written is None or written == "" else written
    if isinstance(arguments, str):
        parsed = _parsed(f"{key}: the arguments of {function['name']}", arguments)
        arguments = WrittenFields(parsed, arguments) if isinstance(parsed, dict) else parsed
    if not isinstance(arguments, dict):
        raise InputError(
            f"{key}: the arguments of {function['name']} must be an object, are {arguments!r:.60}"
        )
    return {**call, "function": {**function, "arguments": arguments}}


def _parsed(key: str, text: str) -> object:
    try:
        return json.loads(text)
    except (ValueError, RecursionError) as error:
        raise InputError(f"{key} must be JSON ({error}), is {text!r:.60}") from error
