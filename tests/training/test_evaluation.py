"""What a run is judged by while it goes on."""

from __future__ import annotations

import json
import re

import pytest
from data_fixtures import write_jsonl
from run_fixtures import metrics, rows, write_run

from droplora_jax.core.errors import InputError
from droplora_jax.inference.decode import decode, prefill
from droplora_jax.runs import config_reader
from droplora_jax.training.evaluation import best_key, tasks_of

TRAIN = {"steps": 24, "eval_every": 12, "save_every": 100, "keep": 1, "eval_examples": 20}


def questions(folder, count=24):
    """Of the kind that a run learns, as a task asks them."""
    asked = [
        {"instruction": row["instruction"], "answer": row["output"].split()[-1]}
        for row in rows(count, seed=2)
    ]
    return write_jsonl(folder / "boolq.jsonl", asked)


def test_a_task_is_scored_as_the_exported_adapter_is(base, droplora, tmp_path):
    asked = questions(tmp_path)
    train = {**TRAIN, "eval_tasks": {"boolq": asked}, "best": "boolq"}
    file = write_run(base, tmp_path, train=train)
    out = droplora.good("train", file)
    found = {row["step"]: row for row in metrics(tmp_path / "run") if "loss" not in row}
    assert found.keys() == {12, 24}
    assert all({"eval_loss", "accuracy/boolq"} <= row.keys() for row in found.values())
    assert f"boolq {found[24]['accuracy/boolq']:.1%}" in out
    assert any(row["accuracy/boolq"] > 0 for row in found.values())
    adapter, scores = tmp_path / "run" / "adapter", tmp_path / "scores.json"
    task = ["--task", f"boolq={asked}", "--limit", 20, "--output", scores, "--batch-size", 8]
    droplora.good("evaluate", base, "--adapter", adapter, *task)
    result = json.loads(scores.read_text())["tasks"]["boolq"]
    assert result["accuracy"] == found[24]["accuracy/boolq"]
    assert result["examples"] == 20
    # Of several that are as good the newest counts.
    best = max(found, key=lambda step: (found[step]["accuracy/boolq"], step))
    droplora.good(
        "export", tmp_path / "run", "--to", tmp_path / "best", "--format", "peft", "--step", "best"
    )
    droplora.good(
        "export",
        tmp_path / "run",
        "--to",
        tmp_path / "same",
        "--format",
        "peft",
        "--step",
        str(best),
    )
    files = [
        (tmp_path / name / "adapter_model.safetensors").read_bytes() for name in ("best", "same")
    ]
    assert files[0] == files[1]
    assert (tmp_path / "run" / "loss.png").stat().st_size > 10_000


def test_a_task_is_scored_with_what_was_compiled_for_the_last_time(base, droplora, tmp_path):
    train = {**TRAIN, "steps": 3, "eval_every": 3, "eval_tasks": {"boolq": questions(tmp_path)}}
    droplora.good("train", write_run(base, tmp_path, train=train))
    compiled = prefill._cache_size(), decode._cache_size()
    again = {"train": {**train, "steps": 6}, "output": str(tmp_path / "longer")}
    droplora.good("train", write_run(base, tmp_path, **again))
    assert (prefill._cache_size(), decode._cache_size()) == compiled


def test_a_task_whose_file_changes_under_a_run_is_named(base, droplora, tmp_path):
    asked = questions(tmp_path)
    train = {**TRAIN, "steps": 3, "eval_every": 3, "eval_tasks": {"boolq": asked}}
    file = write_run(base, tmp_path, train=train)
    droplora.good("train", file)
    questions(tmp_path, count=23)
    result = droplora("train", file, "train.steps=6")
    assert result.code == 2
    assert re.search(r"a run on other data: .*boolq.jsonl was \w{12} and is \w{12}", result.err)


def test_a_task_alone_needs_no_validation_rows(base, droplora, tmp_path):
    train = {**TRAIN, "steps": 4, "eval_every": 4, "eval_tasks": {"boolq": questions(tmp_path)}}
    file = write_run(base, tmp_path, data={"valid": None}, train=train)
    droplora.good("train", file)
    (row,) = [row for row in metrics(tmp_path / "run") if "loss" not in row]
    assert row.keys() == {"step", "accuracy/boolq", "unread/boolq"}


@pytest.mark.parametrize(
    ("tasks", "words"),
    [
        ({"bool": "x.json"}, r"train.eval_tasks.bool: must be one of boolq"),
        ({"mt_bench": "x.json"}, "train.eval_tasks.mt_bench: has no right answers"),
        (
            {"humaneval": "x.json"},
            "train.eval_tasks.humaneval: runs code .* train.eval_run_code=true",
        ),
        ({"boolq": "none.json"}, "none.json"),
    ],
)
def test_tasks_that_cannot_be_scored(tasks, words):
    with pytest.raises(InputError, match=words):
        tasks_of(tasks, 5, False)


def test_a_question_that_is_too_long_is_told_before_the_run(base, droplora, tmp_path):
    asked = write_jsonl(tmp_path / "boolq.jsonl", [{"instruction": "odd? " * 99, "answer": "true"}])
    file = write_run(base, tmp_path, train={**TRAIN, "eval_tasks": {"boolq": asked}})
    result = droplora("train", file, "--dry-run")
    assert result.code == 2
    assert "train.eval_tasks.boolq: example 1: its " in result.err
    assert "more than 128: the model is made for that many" in result.err


def test_what_the_best_is_best_in():
    assert best_key(None, True, ("gsm8k",)) == "eval_loss"
    assert best_key(None, False, ("gsm8k", "boolq")) == "accuracy/gsm8k"
    assert best_key("gsm8k", True, ("gsm8k",)) == "accuracy/gsm8k"
    assert best_key(None, False, ()) is None
    with pytest.raises(InputError, match=r"train.best='loss': must be one of boolq"):
        best_key("loss", False, ("boolq",))
    with pytest.raises(InputError, match=r"train.best='loss': nothing is evaluated"):
        best_key("loss", False, ())


def test_a_task_in_the_yaml(base, tmp_path):
    config = config_reader.read(write_run(base, tmp_path), ["train.eval_tasks={gsm8k: a.jsonl}"])
    assert config.train.eval_tasks == {"gsm8k": "a.jsonl"}
    with pytest.raises(InputError, match=r"train.eval_tasks.*3"):
        config_reader.read(write_run(base, tmp_path), ["train.eval_tasks={gsm8k: 3}"])
