"""What the guides say can be done can be done: links, commands and Python.

A block of `sh` or `python` in a README.md is run in a folder that holds the files which the root
README speaks of, or has a comment before it that says why not: `<!-- not run: WHY -->`. The
options and keys of commands are checked, and the names that Python imports, in any case.
"""

from __future__ import annotations

import ast
import importlib
import re
from contextlib import ExitStack
from pathlib import Path
from unittest.mock import patch

import jax.numpy as jnp
import pytest
from data_fixtures import write_json
from guides import ROOT, blocks, broken_links, guides
from run_fixtures import CommandLine, make_base, rows

import droplora_jax as dl
from droplora_jax.commands import COMMANDS
from droplora_jax.commands.parser import build, command_line
from droplora_jax.data.formats import FORMATS
from droplora_jax.inference.tasks import TASKS
from droplora_jax.models.families import FAMILIES
from droplora_jax.runs import config_reader

MODEL = "path/to/Llama-3.2-1B"  # of the root README
# A tiny model instead, with few positions; some of the steps.
SMALLER = ("data.max_length=72", "train.steps=24", "train.global_batch=8", "train.epochs=null")

GUIDES = {str(file.relative_to(ROOT)): file for file in guides()}


@pytest.fixture(scope="module")
def folder(tmp_path_factory) -> Path:
    """The files that the root README speaks of."""
    folder = tmp_path_factory.mktemp("guides")
    make_base(folder / MODEL)
    write_json(folder / "train.json", rows(40, seed=1))
    write_json(folder / "valid.json", rows(10, seed=2))
    (yaml,) = blocks(ROOT / "README.md", "yaml")
    (folder / "run.yaml").write_text(yaml.text)
    return folder


def test_the_project_has_the_guides_that_it_needs():
    assert len(GUIDES["README.md"].read_text(encoding="utf-8").splitlines()) <= 200
    assert len(GUIDES) > 10


@pytest.mark.parametrize("guide", GUIDES)
def test_links_lead_somewhere(guide):
    assert broken_links(GUIDES[guide]) == []


def test_options_and_keys_of_commands_are_known(folder, monkeypatch):
    monkeypatch.chdir(folder)
    parser = command_line(COMMANDS)
    for file in GUIDES.values():
        for block in blocks(file, "sh"):
            for words in block.commands():
                options, rest = parser.parse_known_args(words)
                assert not any(word.startswith("-") for word in rest), (file, words)
                command = build(options.command, vars(options))
                if hasattr(command, "overrides"):
                    config_reader.read("run.yaml", [*command.overrides, *rest])


def test_programs_of_commands_are_there():
    for file in GUIDES.values():
        for block in blocks(file, "sh"):
            for program in re.findall(r"^python3? ([\w/.]+\.py)", block.text, re.M):
                assert (ROOT / program).exists(), (file, program)


def test_names_in_python_are_there():
    for file in GUIDES.values():
        for block in blocks(file, "python"):
            for node in ast.walk(ast.parse(block.text)):
                if isinstance(node, ast.ImportFrom) and str(node.module).startswith("droplora_jax"):
                    module = importlib.import_module(str(node.module))
                    for alias in node.names:
                        assert hasattr(module, alias.name), (file, block.line, alias.name)
                if isinstance(node, ast.Attribute) and ast.unparse(node.value) == "dl":
                    assert node.attr in dl.__all__, (file, block.line, node.attr)


def test_commands_that_are_not_marked_are_run(folder, monkeypatch, capsys):
    """`droplora` alone: what else a block holds is a comment, or marked."""
    monkeypatch.chdir(folder)
    droplora = CommandLine(capsys)
    for file in GUIDES.values():
        for block in blocks(file, "sh"):
            if block.why is None:
                for words in block.commands():
                    smaller = SMALLER if words[0] == "train" else ()
                    result = droplora(*words, *smaller)
                    assert result.code == 0, (file, block.line, words, result.err)


@pytest.fixture
def registries():
    """A guide that adds to them does so for the test alone."""
    with ExitStack() as stack:
        for registry in (FORMATS, TASKS, FAMILIES, COMMANDS):
            stack.enter_context(patch.dict(registry))
        yield


@pytest.mark.usefixtures("registries")
@pytest.mark.parametrize("guide", GUIDES)
def test_python_that_is_not_marked_runs(guide, folder, monkeypatch):
    monkeypatch.chdir(folder)
    names: dict[str, object] = {}
    for block in blocks(GUIDES[guide], "python"):
        if block.why is None:
            where = "\n" * block.line  # so that a traceback has the guide's lines
            exec(compile(where + block.text, str(block.file), "exec"), names)
    if step := names.get("step"):  # of the root README
        arguments = (names[name] for name in ("adapters", "opt_state", "frozen"))
        _, _, loss = step(*arguments, jnp.ones((8, 16), jnp.int32), 0)
        assert 0 < float(loss) < 20
