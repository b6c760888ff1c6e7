"""`droplora evaluate`: scores in a file, whatever interrupts it, and nothing overwritten."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path

import pytest
from data_fixtures import write_json, write_jsonl
from rich.console import Console
from run_fixtures import make_base, rows, write_run

from droplora_jax.commands.evaluate import Evaluate
from droplora_jax.commands.evaluate_scores import table
from droplora_jax.commands.options import ModelRef, TaskOptions
from droplora_jax.core.errors import InputError
from droplora_jax.inference.generator import Generator
from droplora_jax.inference.scoring import Result, evaluate
from droplora_jax.inference.tasks import TASKS
from droplora_jax.runs.open_model import open_model

BOOLQ = [{"instruction": f"odd? {n}", "answer": "true" if n % 2 else "false"} for n in range(11)]
QUESTIONS = [{"question_id": n, "turns": [f"Is {n} odd?", "Why?"]} for n in (81, 82)]
ADD = {
    "task_id": "HumanEval/0",
    "prompt": "def add(a, b):\n",
    "entry_point": "add",
    "test": "def check(candidate):\n    assert candidate(1, 2) == 3\n",
}


@pytest.fixture(scope="module")
def base(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return make_base(tmp_path_factory.mktemp("base"), max_position_embeddings=512).path


@pytest.fixture
def boolq(tmp_path: Path) -> str:
    return "boolq=" + write_json(tmp_path / "boolq.json", BOOLQ)


class Odd:
    """A model that knows the answer; it breaks when it is asked for the `breaks_at`-th time."""

    def __init__(self, breaks_at: int | None = None) -> None:
        self.asked: list[str] = []
        self.breaks_at = breaks_at

    def __call__(self, prompts, sampling):
        if self.breaks_at is not None and len(self.asked) >= self.breaks_at:
            raise KeyboardInterrupt
        self.asked += prompts
        return ["true" if any(f"odd? {n}\n" in p for n in (1, 3, 5)) else "false" for p in prompts]


def evaluation(model: Path, *tasks: str, **options: int) -> Evaluate:
    """`scored` says where the output goes."""
    return Evaluate(
        source=ModelRef(model=str(model)),
        task=tasks,
        output=Path("scores.json"),
        options=TaskOptions(**options),
    )


def scored(monkeypatch, config: Evaluate, output: Path, complete) -> dict:
    monkeypatch.setattr("droplora_jax.commands.evaluate_scores._opened", lambda *_: complete)
    replace(config, output=output).run()
    return json.loads(output.read_text())


def test_the_file_holds_scores_and_every_row(monkeypatch, tmp_path, base, boolq):
    config = evaluation(base, boolq, batch_size=4)
    report = scored(monkeypatch, config, tmp_path / "out.json", Odd())
    found = report["tasks"]["boolq"]
    # 1, 3, 5 are found, 7 and 9 are not, and the six even ones are right.
    assert (found["examples"], found["right"], found["accuracy"]) == (11, 9, 9 / 11)
    assert found["unread"] == 0
    low, high = found["interval_95"]
    assert 0 < low < 9 / 11 < high < 1
    assert found["max_new_tokens"] == 32
    assert [row["id"] for row in found["rows"]] == [str(n) for n in range(1, 12)]
    row = found["rows"][7]
    assert (row["completion"], row["extracted"], row["right"], row["answer"]) == (
        "false",
        "false",
        False,
        "true",
    )
    assert "odd? 7" in row["prompt"]
    assert sorted(file.name for file in tmp_path.iterdir()) == ["boolq.json", "out.json"]


def test_an_interrupted_evaluation_carries_on(monkeypatch, tmp_path, base, boolq):
    config = evaluation(base, boolq, batch_size=2)
    whole = scored(monkeypatch, config, tmp_path / "whole.json", Odd())
    first, output = Odd(breaks_at=6), tmp_path / "out.json"
    with pytest.raises(KeyboardInterrupt):
        scored(monkeypatch, config, output, first)
    assert not output.exists()
    partial = tmp_path / "out.json.part"
    with partial.open("a") as file:  # as a crash leaves it
        file.write('{"task": "boolq", "id": "1", "comp')
    second = Odd()
    assert scored(monkeypatch, evaluation(base, boolq, batch_size=3), output, second) == whole
    assert len(first.asked) == 6
    assert sorted(first.asked + second.asked) == sorted(
        TASKS["boolq"].prompt(row, ()) for row in BOOLQ
    )
    assert not partial.exists()


def test_rows_that_are_all_there_need_no_model(monkeypatch, tmp_path, base, boolq):
    config, output = evaluation(base, boolq), tmp_path / "out.json"
    monkeypatch.setattr("droplora_jax.commands.evaluate_scores._report", lambda *_: 1 / 0)
    with pytest.raises(ZeroDivisionError):
        scored(monkeypatch, config, output, Odd())
    monkeypatch.undo()
    found = scored(monkeypatch, config, output, Odd(breaks_at=0))
    assert found["tasks"]["boolq"]["examples"] == 11


@pytest.mark.parametrize(
    ("changes", "key"),
    [
        ({"limit": 5}, "limit"),
        ({"max_new_tokens": 4}, "max_new_tokens"),
        ({"dtype": "bfloat16"}, "dtype"),
        ({"model": "other"}, "model"),
        ({"weights": "changed"}, r"\bfiles"),
        ({"rows": "changed"}, "task_files"),
        ({"tasks": "another"}, "task_files"),
    ],
)
def test_other_settings_do_not_mix_with_rows_that_are_there(monkeypatch, tmp_path, changes, key):
    model, other = (make_base(tmp_path / name).path for name in ("model", "other"))
    file = write_json(tmp_path / "boolq.json", BOOLQ)
    config, output = evaluation(model, f"boolq={file}", batch_size=2), tmp_path / "out"
    with pytest.raises(KeyboardInterrupt):
        scored(monkeypatch, config, output, Odd(breaks_at=4))
    before = Path(f"{output}.part").read_text()
    if changes.pop("weights", None):
        shard = sorted(model.glob("*.safetensors"))[0]
        shard.write_bytes(shard.read_bytes())
    if changes.pop("rows", None):
        write_json(Path(file), BOOLQ[1:])
    if changes.pop("tasks", None):
        changes["task"] = (
            *config.task,
            "openbookqa="
            + write_json(tmp_path / "o.json", [{"instruction": "?", "answer": "answer1"}]),
        )
    if changes.pop("model", None):
        changes["source"] = replace(config.source, model=str(other))
    if dtype := changes.pop("dtype", None):
        changes["source"] = replace(config.source, dtype=dtype)
    if {"limit", "max_new_tokens"} & set(changes):
        changes = {"options": replace(config.options, **changes)}
    with pytest.raises(InputError, match=rf"begun with other settings \(.*{key}: "):
        scored(monkeypatch, replace(config, **changes), output, Odd())
    assert Path(f"{output}.part").read_text() == before


def test_mt_bench_is_written_for_a_judge(monkeypatch, tmp_path, base):
    file = write_jsonl(tmp_path / "q.jsonl", QUESTIONS)
    config = evaluation(base, f"mt_bench={file}")
    report = scored(monkeypatch, config, tmp_path / "out.json", Odd())
    assert report["tasks"]["mt_bench"]["accuracy"] is None
    lines = (tmp_path / "out.mt_bench.jsonl").read_text().splitlines()
    assert [json.loads(line)["question_id"] for line in lines] == [81, 82]
    assert json.loads(lines[0])["model_id"] == "out"
    assert json.loads(lines[0])["choices"][0]["turns"] == ["false", "false"]
    (tmp_path / "out.json").unlink()
    with pytest.raises(InputError, match=r"out.mt_bench.jsonl: exists; nothing is overwritten"):
        scored(monkeypatch, config, tmp_path / "out.json", Odd())


def test_the_table(capsys):
    def row(right, extracted="1"):
        return {"id": "1", "right": right, "extracted": extracted}

    results = [
        Result("boolq", tuple(map(row, [True, True, False, True]))),
        Result("gsm8k", (row(False), *(row(False, None) for _ in range(3)))),
        Result("mt_bench", (row(None),)),
    ]
    Console(width=80).print(table(results))
    lines = [line.split() for line in capsys.readouterr().out.splitlines()]
    assert ["boolq", "4", "3", "0", "75.00%", "30.06%", "..", "95.44%"] in lines
    assert ["gsm8k", "4", "0", "3", "0.00%", "0.00%", "..", "48.99%"] in lines
    assert ["mt_bench", "1", "for", "a", "judge"] in lines
    assert ["mean", "37.50%"] in lines


# --- the command line


def test_base_adapter_and_merged_are_scored_alike(droplora, tmp_path, base):
    """A model that learnt to answer beats the base; its adapter and its merge say the same."""
    droplora.good(
        "train",
        write_run(
            base,
            tmp_path,
            train={"steps": 30, "eval_every": 30, "save_every": 30},
            data={"valid": None},
            adapter={"drop_rate": 0.0},
        ),
    )
    test = [
        {"instruction": row["instruction"], "answer": row["output"].split()[-1]}
        for row in rows(8, seed=3)
    ]
    given = ["--task", "boolq=" + write_json(tmp_path / "test.json", test), "--max-new-tokens", 8]
    folder = tmp_path / "run"
    droplora.good("export", folder, "--to", tmp_path / "merged", "--format", "merged")
    models = {
        "base": [base],
        "adapter": [base, "--adapter", folder / "adapter"],
        "run": [folder],
        "merged": [tmp_path / "merged"],
    }
    found = {}
    for name, words in models.items():
        out = droplora.good("evaluate", *words, *given, "--output", tmp_path / f"{name}.json")
        assert "boolq" in out
        found[name] = json.loads((tmp_path / f"{name}.json").read_text())["tasks"]["boolq"]
    said = {name: [row["completion"] for row in task["rows"]] for name, task in found.items()}
    assert said["adapter"] == said["run"] == said["merged"] != said["base"]
    assert found["adapter"]["accuracy"] > found["base"]["accuracy"]
    assert {text[:14] for text in said["adapter"]} == {"the answer is "}


def test_a_model_says_the_same_as_when_it_is_called(base):
    """The pure function, as training uses it."""
    opened = open_model(str(base))
    generator = Generator(opened.model, opened.tokenizer, batch_size=4)
    examples = [{"id": str(i), **TASKS["boolq"].convert(row)} for i, row in enumerate(BOOLQ)]
    result = evaluate(TASKS["boolq"], examples, generator, limit=6, max_new_tokens=5, batch_size=4)
    assert [row["id"] for row in result.rows] == list("012345")
    alone = Generator(opened.model, opened.tokenizer, batch_size=1)
    for row in result.rows[:2]:
        again = evaluate(TASKS["boolq"], [examples[int(row["id"])]], alone, max_new_tokens=5)
        assert again.rows[0] == row


@pytest.mark.parametrize(
    ("words", "says"),
    [
        (["--task", "bolq={file}"], "did you mean 'boolq'?"),
        (["--task", "zzz={file}"], "There are boolq, piqa"),
        (["--task", "boolq"], "boolq=FILE"),
        (["--task", "boolq=missing.json"], "missing.json: no such file"),
        (["--task", "gsm8k={file}"], "boolq.json, row 1: answer has no number behind ####"),
        (["--task", "math={file}"], "output is missing (a row of math)"),
        (["--task", "humaneval={code}"], "allow it with --run-code"),
        (["--task", "boolq={file}", "--task", "boolq={file}"], "boolq: given twice"),
        (["--task", "boolq={file}", "--limit", "0"], "--limit 0: must be at least 1"),
        (["--task", "boolq={file}", "--batch-size", "0"], "--batch-size 0: must be at least 1"),
        (["--task", "boolq={file}", "--adapter", "{folder}/none"], "none"),
        (["--task", "boolq={file}", "--max-new-tokens", "999"], "boolq.json, boolq 1: its"),
    ],
)
def test_bad_input_says_what_to_do(droplora, tmp_path, base, words, says):
    places = {
        "file": write_json(tmp_path / "boolq.json", BOOLQ),
        "code": write_jsonl(tmp_path / "code.jsonl", [ADD]),
        "folder": str(tmp_path),
    }
    words = [word.format(**places) for word in words]
    result = droplora("evaluate", base, *words, "--output", tmp_path / "out.json")
    assert result.code == 2
    assert says in result.err
    assert not list(tmp_path.glob("out.json*"))


def test_an_output_that_exists_is_kept(droplora, tmp_path, base, boolq):
    output = tmp_path / "out.json"
    output.write_text("mine")
    result = droplora("evaluate", base, "--task", boolq, "--output", output)
    assert result.code == 2
    assert "exists; nothing is overwritten" in result.err
    assert output.read_text() == "mine"


def test_code_is_run_with_the_flag(droplora, tmp_path, base):
    task = "humaneval=" + write_jsonl(tmp_path / "code.jsonl", [ADD])
    words = ["--task", task, "--max-new-tokens", 4, "--run-code"]
    droplora.good("evaluate", base, *words, "--output", tmp_path / "out.json")
    (row,) = json.loads((tmp_path / "out.json").read_text())["tasks"]["humaneval"]["rows"]
    assert row["right"] is False
    assert row["note"]
