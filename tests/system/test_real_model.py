"""A pretrained model from inspection to scores, as a user goes, beside transformers and PEFT.

It takes about a quarter of an hour on two cores, and needs the extra `real`. `DROPLORA_DATA` is the
folder of public data sets.
"""

from __future__ import annotations

import json
import os
import subprocess
import sys
from collections.abc import Sequence
from pathlib import Path

import pytest
import torch
from data_fixtures import write_jsonl
from real_model import gguf_file, real_model
from run_fixtures import metrics, write_yaml

DATA = os.environ.get("DROPLORA_DATA")
pytestmark = [
    pytest.mark.slow,
    pytest.mark.skipif(gguf_file() is None, reason="install the extra real"),
    pytest.mark.skipif(DATA is None, reason="set DROPLORA_DATA to the folder of data sets"),
]
QUESTIONS = ["What is the capital of France?", "Name three colours.", "What is 2 + 3?"]
SETS = ("boolq", "openbookqa")  # of those that are scored
NEW = 24


def droplora(*arguments: object) -> str:
    """What a command says, on one device and with XLA's optimisations, which tests go without."""
    environment = {key: value for key, value in os.environ.items() if key != "XLA_FLAGS"}
    done = subprocess.run(
        [sys.executable, "-m", "droplora_jax.cli", *map(str, arguments)],
        env=environment,
        capture_output=True,
        text=True,
    )
    assert done.returncode == 0, done.stderr
    return done.stdout


def completions(folder: Path, *model: object, template: str = "recorded") -> list[str]:
    """Of the questions, by `droplora generate`."""
    prompts = write_jsonl(folder / "prompts.jsonl", [{"prompt": text} for text in QUESTIONS])
    output = folder / f"{len(list(folder.iterdir()))}.jsonl"
    how = ("--template", template, "--max-new-tokens", NEW, "--output", output)
    droplora("generate", *model, "--prompts", prompts, *how)
    return [json.loads(line)["completion"] for line in output.read_text().splitlines()]


def by_transformers(model: torch.nn.Module, tokenizer) -> list[str]:
    """Of the questions, greedily, one at a time."""
    texts = []
    for question in QUESTIONS:
        inputs = tokenizer.apply_chat_template(
            [{"role": "user", "content": question}],
            add_generation_prompt=True,
            return_tensors="pt",
            return_dict=True,
        )
        ids = model.generate(**inputs, max_new_tokens=NEW, do_sample=False)[0]
        texts.append(
            tokenizer.decode(ids[inputs["input_ids"].shape[1] :], skip_special_tokens=True)
        )
    return texts


def opened(folder: Path):
    from transformers import AutoModelForCausalLM, AutoTokenizer

    model = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32).eval()
    return model, AutoTokenizer.from_pretrained(folder)


@pytest.fixture(scope="module")
def base() -> Path:
    return real_model()


@pytest.fixture(scope="module")
def run(base: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The folder of a run of 30 steps on instructions."""
    folder = tmp_path_factory.mktemp("run")
    tree = {
        "model": {"path": str(base)},
        "output": str(folder / "run"),
        "adapter": {"rank": 8, "alpha": 16.0},
        "data": {
            "train": f"{DATA}/alpaca_en_demo.json",
            "valid_fraction": 0.02,
            "template": "chat",
            "max_length": 192,
        },
        "optim": {"learning_rate": 5e-4, "warmup_steps": 5},
        "train": {"steps": 30, "global_batch": 4, "eval_every": 10, "save_every": 30},
    }
    droplora("train", write_yaml(folder / "run.yaml", tree))
    return folder / "run"


@pytest.fixture(scope="module")
def exports(run: Path) -> dict[str, Path]:
    folders = {form: run.parent / form for form in ("merged", "peft")}
    # In the base's own bfloat16, 30 steps move most weights by less than its rounding.
    droplora("export", run, "--to", folders["merged"], "--format", "merged", "--dtype", "float32")
    droplora("export", run, "--to", folders["peft"], "--format", "peft")
    return folders


def test_it_is_inspected(base):
    shown = droplora("inspect", base)
    for line in ("family: llama", "layers: 30 of width 576", "parameters: 134,515,008 bfloat16"):
        assert line in shown


def test_it_answers_as_with_transformers(base, tmp_path):
    said = completions(tmp_path, base, template="chat")
    assert "Paris" in said[0]
    assert said == by_transformers(*opened(base))


def test_it_learns(run):
    losses = [row["eval_loss"] for row in metrics(run) if "eval_loss" in row]
    assert len(losses) == 3
    assert losses[0] > losses[1] > losses[2]


def test_its_exports_answer_alike_everywhere(run, exports, base, tmp_path):
    import peft

    said = completions(tmp_path, run)
    assert "Paris" in said[0]
    assert completions(tmp_path, exports["peft"]) == said
    assert completions(tmp_path, exports["merged"], template="chat") == said
    merged, tokenizer = opened(exports["merged"])
    assert by_transformers(merged, tokenizer) == said
    plain, tokenizer = opened(base)
    adapted = peft.PeftModel.from_pretrained(plain, exports["peft"]).eval()
    assert by_transformers(adapted, tokenizer) == said


def scored(model: Sequence[object], folder: Path) -> dict[str, dict]:
    tasks = [
        word for name in SETS for word in ("--task", f"{name}={DATA}/commonsense_{name}_test.json")
    ]
    output = folder / "scores.json"
    shown = droplora(
        "evaluate", *model, *tasks, "--limit", 200, "--batch-size", 32, "--output", output
    )
    assert all(name in shown for name in SETS)
    return json.loads(output.read_text())["tasks"]


def test_it_is_scored(base, tmp_path):
    found = scored([base], tmp_path)
    for name in SETS:
        task = found[name]
        assert len(task["rows"]) == task["examples"] == 200
        assert task["right"] + task["unread"] <= 200
