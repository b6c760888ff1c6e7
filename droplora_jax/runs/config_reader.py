"""A run's YAML: read strictly, every mistake of the file named at once."""

from __future__ import annotations

import copy
import dataclasses
import io
import json
import typing
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from pydantic import TypeAdapter, ValidationError
from pydantic_core import ErrorDetails
from ruamel.yaml import YAML
from ruamel.yaml.error import YAMLError

from droplora_jax.adapters import ADAPTERS
from droplora_jax.core.errors import InputError, did_you_mean
from droplora_jax.runs.config import RunConfig

Tree = Mapping[str, Any]  # plain dicts, lists and scalars
Mistake = ErrorDetails


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


def _checked(tree: Tree, file: str, overridden: set[str]) -> RunConfig:
    # By way of JSON, where a list may stand for a tuple and nothing else is converted.
    def validated(tree: Tree) -> RunConfig:
        return TypeAdapter(RunConfig).validate_json(json.dumps(tree, default=str))

    try:
        return validated(tree)
    except ValidationError as error:
        mistakes = error.errors()
    # A section with an unknown key is checked no further, so it is checked again without the key.
    try:
        validated(_without_unknown(tree, mistakes))
    except ValidationError as error:
        mistakes += [mistake for mistake in error.errors() if mistake not in mistakes]
    raise InputError(*_messages(mistakes, tree, file, overridden))


def _without_unknown(tree: Tree, mistakes: Sequence[Mistake]) -> Tree:
    known = copy.deepcopy(dict(tree))
    for mistake in mistakes:
        if mistake["type"] == "unexpected_keyword_argument":
            *path, last = _keys(mistake, tree)
            section: Any = known
            for key in path:
                section = section[int(key)] if isinstance(section, list) else section[key]
            section.pop(last, None)
    return known


def _messages(
    mistakes: Sequence[Mistake], tree: Tree, file: str, overridden: set[str]
) -> list[str]:
    """One line for each mistake; the alternatives of a union are one mistake."""

    def where(key: str) -> str:
        return "command line" if _touches(key, overridden) else file

    rules: dict[str, list[str]] = {}  # by the beginning of the line
    mistakes = [_in_kind(mistake) for mistake in mistakes]
    paths = [_keys(mistake, tree) for mistake in mistakes]
    for mistake, path in zip(mistakes, paths, strict=True):
        key = ".".join(path)
        if mistake["type"] == "value_error":  # a dataclass has checked its fields
            for problem in mistake["ctx"]["error"].within(key).problems:
                rules[f"{where(problem.partition('=')[0])}: {problem}"] = []
        elif not any(path == other[: len(path)] and len(path) < len(other) for other in paths):
            start = f"{where(key)}: {key}{_shown(mistake)}"
            rules.setdefault(start, []).append(_rule(mistake, path))
        # Else an alternative that was not meant: the mistake is further below.
    return [start + " or ".join(dict.fromkeys(rule)) for start, rule in rules.items()]


def _in_kind(mistake: Mistake) -> Mistake:
    """For an unknown adapter kind, the mistake placed at `adapter.kind`; any other unchanged."""
    if mistake["type"] != "union_tag_invalid":
        return mistake
    rule = f"Input should be {' or '.join(map(repr, ADAPTERS))}"
    tag = mistake["ctx"]["tag"]
    return {**mistake, "loc": (*mistake["loc"], "kind"), "input": tag, "msg": rule}


def _rule(mistake: Mistake, path: list[str]) -> str:
    """What is wrong, in words."""
    if "missing" in mistake["type"]:
        return "is missing"
    if mistake["type"] == "unexpected_keyword_argument":
        if path[:-1] == ["adapter"] and (others := _kinds_with(path[-1])):
            return (
                f"{mistake['loc'][1]!r} has no such option; of kind {' or '.join(others)} it is one"
            )
        known = _known_keys(path[:-1], mistake["loc"])
        hint = did_you_mean(path[-1], known) or f"there are {', '.join(known)}"
        return f"unknown key; {hint}"
    rule = mistake["msg"].removeprefix("Input should be ").removeprefix("Input ")
    return f"must be {rule}"


def _kinds_with(option: str) -> list[str]:
    """The kinds of adapter that have an option."""
    fields = {kind: dataclasses.fields(cls) for kind, cls in ADAPTERS.items()}
    return [kind for kind, of_kind in fields.items() if option in {f.name for f in of_kind}]


def _shown(mistake: Mistake) -> str:
    return " " if "missing" in mistake["type"] else f"={mistake['input']!r}: "


def _touches(key: str, overridden: set[str]) -> bool:
    return any(key == other or other.startswith(f"{key}.") for other in overridden)


def _keys(mistake: Mistake, tree: Any) -> list[str]:
    """The keys in an error's location, which also names the alternatives of a union."""
    keys: list[str] = []
    location = mistake["loc"]
    named = "missing" in mistake["type"] or mistake["type"] == "unexpected_keyword_argument"
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
    classes = [cls for cls in inner if cls is not None]
    named = [cls for cls in classes if getattr(cls, "kind", None) in location]
    return next(iter(named or classes), None)


def _first_lines(error: Exception) -> str:
    return " ".join(line.strip() for line in str(error).splitlines() if line.strip())[:300]
