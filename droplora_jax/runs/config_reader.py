"""A run's configuration: it composes the parts' own, and is read strictly from one YAML."""

from __future__ import annotations

import dataclasses
import difflib
import io
import json
import typing
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from pydantic import TypeAdapter, ValidationError
from ruamel.yaml import YAML
from ruamel.yaml.error import YAMLError

from droplora_jax.adapters import ADAPTERS
from droplora_jax.core.errors import InputError
from droplora_jax.runs.config import RunConfig


def read(file: str | Path, overrides: Sequence[str] = ()) -> RunConfig:
    """Read a run's YAML, then `section.key=value` overrides.

    Raises:
      InputError: names the file, the key, the value, the rule and the nearest right name.
    """
    file = Path(file)
    try:
        tree = _yaml().load(file.read_text(encoding="utf-8"))
    except FileNotFoundError as error:
        raise InputError(f"{file}: no such file") from error
    except (OSError, UnicodeDecodeError, YAMLError) as error:
        raise InputError(f"{file}: can't be read as YAML ({_first_lines(error)})") from error
    if not isinstance(tree, dict):
        raise InputError(f"{file}: must hold keys and values, such as 'model:' and 'output:'")
    for override in overrides:
        _override(tree, override)
    return _checked(tree, str(file), {override.partition("=")[0] for override in overrides})


def dump(config: RunConfig) -> str:
    """The resolved, complete YAML of a run."""
    text = io.StringIO()
    _yaml().dump(as_tree(config), text)
    return text.getvalue()


def as_tree(config: RunConfig) -> dict[str, Any]:
    """The configuration as plain dicts, lists and scalars."""
    return json.loads(json.dumps(dataclasses.asdict(config)))


def _yaml() -> YAML:
    # YAML 1.2: 3e-4 is a number, `no` and `on` are words, a key given twice is an error.
    yaml = YAML(typ="safe", pure=True)
    yaml.default_flow_style = False
    yaml.sort_base_mapping_type_on_output = False  # type: ignore[assignment]
    return yaml


def _override(tree: dict[str, Any], override: str) -> None:
    key, equals, text = override.partition("=")
    if not equals or not key:
        raise InputError(f"command line: {override!r}: an override is section.key=value")
    try:
        value = _yaml().load(text) if text else None
    except YAMLError as error:
        raise InputError(f"command line: {override}: not a YAML value") from error
    *sections, last = key.split(".")
    for section in sections:
        tree = tree.setdefault(section, {})
        if not isinstance(tree, dict):
            raise InputError(f"command line: {override}: {section} is not a section")
    tree[last] = value


def _checked(tree: Mapping[str, Any], file: str, overridden: set[str]) -> RunConfig:
    try:
        # By way of JSON, where a list may stand for a tuple and nothing else is converted.
        return TypeAdapter(RunConfig).validate_json(json.dumps(tree, default=str))
    except ValidationError as error:
        raise InputError("\n".join(_messages(error, tree, file, overridden))) from error


def _messages(
    error: ValidationError, tree: Mapping[str, Any], file: str, overridden: set[str]
) -> list[str]:
    """One line a mistake; the alternatives of a union are one mistake."""
    rules: dict[tuple[str, str], list[str]] = {}
    details = [_of_kind(detail) for detail in error.errors()]
    paths = [_keys(detail, tree) for detail in details]
    for detail, path in zip(details, paths, strict=True):
        if any(path == other[: len(path)] and len(path) < len(other) for other in paths):
            continue  # an alternative that was not meant: what was is wrong further below
        key, rule = ".".join(path), _rule(detail, path)
        if detail["type"] == "value_error":  # one of ours, which names its key itself
            key = rule.partition("=")[0]
        where = "command line" if _touches(key, overridden) else file
        start = "" if detail["type"] == "value_error" else f"{key}{_shown(detail)}"
        rules.setdefault((where, start), []).append(rule)
    return [f"{where}: {start}{' or '.join(rule)}" for (where, start), rule in rules.items()]


def _of_kind(detail: Any) -> Any:
    """A section of a kind that is not known: the mistake is in its `kind`."""
    if detail["type"] != "union_tag_invalid":
        return detail
    rule = f"Input should be {' or '.join(map(repr, ADAPTERS))}"
    return {**detail, "loc": (*detail["loc"], "kind"), "input": detail["ctx"]["tag"], "msg": rule}


def _rule(detail: Any, path: list[str]) -> str:
    """What is wrong, in words."""
    if detail["type"] == "value_error":
        return str(detail["ctx"]["error"])
    if "missing" in detail["type"]:
        return "is missing"
    if detail["type"] == "unexpected_keyword_argument":
        if path[:-1] == ["adapter"] and (others := _kinds_with(path[-1])):
            return (
                f"{detail['loc'][1]!r} has no such option; of kind {' or '.join(others)} it is one"
            )
        known = _known_keys(path[:-1], detail["loc"])
        near = difflib.get_close_matches(path[-1], known, n=1, cutoff=0.5)
        hint = f"did you mean {near[0]}?" if near else f"there are {', '.join(known)}"
        return f"unknown key; {hint}"
    rule = detail["msg"].removeprefix("Input should be ").removeprefix("Input ")
    return f"must be {rule}"


def _kinds_with(option: str) -> list[str]:
    """The kinds of adapter that have an option."""
    fields = {kind: dataclasses.fields(cls) for kind, cls in ADAPTERS.items()}
    return [kind for kind, of_kind in fields.items() if option in {f.name for f in of_kind}]


def _shown(detail: Any) -> str:
    return " " if "missing" in detail["type"] else f"={detail['input']!r}: "


def _touches(key: str, overridden: set[str]) -> bool:
    return any(key == other or other.startswith(f"{key}.") for other in overridden)


def _keys(detail: Any, tree: Any) -> list[str]:
    """The keys in an error's location, which also names the alternatives of a union."""
    keys: list[str] = []
    location = detail["loc"]
    named = "missing" in detail["type"] or detail["type"] == "unexpected_keyword_argument"
    for i, part in enumerate(location):
        last = i == len(location) - 1
        is_key = isinstance(tree, dict) and (part in tree or (named and last))
        if not is_key and not (isinstance(tree, list) and isinstance(part, int)):
            continue
        keys.append(str(part))
        tree = tree.get(part) if isinstance(tree, dict) else tree[part]
    return keys


def _known_keys(path: Sequence[str], location: Sequence[Any]) -> list[str]:
    """The keys that may stand below `path`, of the kinds in `location`; none below a value."""
    cls: Any = RunConfig
    for part in path:
        if not part.isdigit():  # the place in a list
            cls = _section(typing.get_type_hints(cls).get(part), location)
        if cls is None:
            return []
    return [f.name for f in dataclasses.fields(cls)]


def _section(hint: Any, location: Sequence[Any]) -> Any:
    """The dataclass in a type; of several kinds, that which `location` names, or the first."""
    if dataclasses.is_dataclass(hint):
        return hint
    inner = [_section(part, location) for part in typing.get_args(hint)]
    found = [cls for cls in inner if cls is not None]
    named = [cls for cls in found if getattr(cls, "kind", None) in location]
    return next(iter(named or found), None)


def _first_lines(error: Exception) -> str:
    return " ".join(line.strip() for line in str(error).splitlines() if line.strip())[:300]
