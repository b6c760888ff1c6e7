"""A base is opened once in a command and passed on."""

from __future__ import annotations

from pathlib import Path

import pytest
from run_fixtures import write_jsonl, write_run

from droplora_jax.core.errors import InputError
from droplora_jax.hf import source
from droplora_jax.hf.base import Base


@pytest.fixture
def opened(monkeypatch):
    """The bases that were opened, in order, by the two functions that look for one."""
    calls: dict[str, list[Path]] = {"resolve": [], "read_config": []}

    def recorded(name):
        original = getattr(source, name)

        def call(path, *arguments):
            calls[name].append(Path(path))
            return original(path, *arguments)

        return call

    for name in calls:
        monkeypatch.setattr(source, name, recorded(name))
    return calls


def test_a_command_opens_its_base_once(base, tmp_path, droplora, opened):
    run, merged = tmp_path / "run", tmp_path / "merged"
    small = {"adapter": {"targets": "q_proj"}, "data": {"valid": ...}}  # little to compile
    config = write_run(base, tmp_path, train={"steps": 4, "eval_every": ...}, **small)
    prompts = write_jsonl(tmp_path / "prompts.jsonl", [{"prompt": "odd? 7"}])
    question = {"question": "1+1?", "answer": "#### 2"}
    task = write_jsonl(tmp_path / "task.jsonl", [question])
    short = ("--max-new-tokens", 2, "--batch-size", 1)
    commands = [
        ("train", config, "--dry-run"),
        ("train", config),
        ("plan", config, "--topology", "cpu:8"),
        ("export", run, "--to", merged, "--format", "merged"),
        ("export", run / "adapter", "--to", tmp_path / "adapter", "--format", "peft"),
        ("generate", run, "--prompts", prompts, "--output", tmp_path / "out.jsonl", *short),
        ("evaluate", run, "--task", f"gsm8k={task}", "--output", tmp_path / "out.json", *short),
    ]
    for command in commands:
        for calls in opened.values():
            calls.clear()
        droplora.good(*command)
        for name, calls in opened.items():
            assert calls.count(base) == 1, (command, name)


def test_what_is_opened(base, monkeypatch):
    monkeypatch.chdir(base.parent)
    found = Base.open(base.name)
    assert found.folder == found.source.folder == base.resolve()
    assert (found.source.path, found.source.revision) == (str(base.resolve()), None)
    assert found.shape.family == "llama"
    assert found.tokenizer is found.tokenizer


def test_an_error_names_the_argument(tmp_path):
    with pytest.raises(InputError, match=r"^path='nothing': no such folder"):
        Base.open("nothing")
