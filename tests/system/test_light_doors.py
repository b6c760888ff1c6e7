"""Help and mistakes are answered at once: without JAX, or a library that takes as long to import."""

from __future__ import annotations

import json
import subprocess
import sys
from dataclasses import dataclass

import pytest

HEAVY = ("jax", "optax", "orbax", "grain", "flax", "transformers", "torch")

COMMANDS = ("quickstart", "train", "export", "generate", "evaluate", "plan", "inspect")

RUN = """
model: {path: some/base}
output: somewhere
data: {train: train.json}
train: {steps: 1, global_batch: 1}
"""

# What is typed, the exit code, and a part of the answer.
CASES = {
    "help": ("--help", 0, "usage: droplora"),
    **{f"help of {name}": (f"{name} --help", 0, f"usage: droplora {name}") for name in COMMANDS},
    "no such command": ("trian", 2, "invalid choice: 'trian'"),
    "a flag": ("export run --to x --fromat peft", 2, "required: --format"),
    "a choice": ("export run --to x --format gguf", 2, "invalid choice: 'gguf'"),
    "a number": ("evaluate m --task a=b --output x --limit 0", 2, "--limit 0: must be at least 1"),
    "a flag too few": ("generate m --prompts file", 2, "--prompts and --output go together"),
    "a range": ("generate m --temperature -1", 2, "temperature=-1.0: must be"),
    "a key": ("train run.yaml adapter.rnak=4", 2, "rnak=4: unknown key; did you mean rank?"),
    "a value": ("train run.yaml adapter.rank=0", 2, "adapter.rank=0: must be at least 1"),
    "a section": ("train run.yaml optin.rank=0", 2, "did you mean optim"),
    "a rate": ("train run.yaml optim.learning_rate=-1", 2, "optim.learning_rate=-1"),
    "no file": ("train none.yaml", 2, "none.yaml: no such file"),
}

# Runs one command line after another; what one of them imports is there after it.
PROGRAM = f"""
import contextlib, io, json, sys
from droplora_jax.cli import main

def run(arguments):
    said = io.StringIO()
    with contextlib.redirect_stdout(said), contextlib.redirect_stderr(said):
        try:
            code = main(arguments)
        except SystemExit as exit:
            code = exit.code
    heavy = [name for name in {HEAVY} if name in sys.modules]
    return [code, said.getvalue(), heavy]

print(json.dumps([run(line.split()) for line in sys.argv[1:]]))
"""


@dataclass(frozen=True)
class Answer:
    code: int
    text: str
    heavy: list[str]


@pytest.fixture(scope="module")
def answers(tmp_path_factory) -> dict[str, Answer]:
    folder = tmp_path_factory.mktemp("doors")
    (folder / "run.yaml").write_text(RUN)
    lines = [line for line, *_ in CASES.values()]
    printed = subprocess.check_output([sys.executable, "-c", PROGRAM, *lines], cwd=folder)
    return dict(zip(CASES, (Answer(*answer) for answer in json.loads(printed)), strict=True))


@pytest.mark.parametrize("case", CASES)
def test_the_command_line_answers_without_jax(answers, case):
    _, code, text = CASES[case]
    answer = answers[case]
    assert (answer.code, answer.heavy) == (code, []), answer.text
    assert text in answer.text


def test_names_of_the_package_are_imported_when_they_are_used():
    program = f"""
import sys
import droplora_jax as dl

assert not set({HEAVY}) & set(sys.modules)
assert set(dl.__all__) <= set(dir(dl))
dl.DropLoRA(rank=4), dl.MeshConfig(), dl.Sampling(), dl.InputError, dl.__version__
assert not set({HEAVY}) & set(sys.modules), set({HEAVY}) & set(sys.modules)
dl.load, dl.inject, dl.split, dl.merge, dl.save_merged
from droplora_jax.training import optimizer, step

loaded = {{"grain", "orbax", "torch", "transformers"}} & set(sys.modules)
assert not loaded, loaded  # a loop of one's own needs none of them
assert all(hasattr(dl, name) for name in dl.__all__)
"""
    subprocess.run([sys.executable, "-c", program], check=True)
