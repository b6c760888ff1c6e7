"""From a run's folder to other tools: `droplora export`, and which settings may change."""

from __future__ import annotations

import dataclasses
import json
import re
import shutil
import signal
import time

import jax.numpy as jnp
import numpy as np
import peft
import pytest
import torch
import transformers
from data_fixtures import write_jsonl
from fake_step import FakeStep, use
from run_fixtures import (
    LENGTH,
    contents,
    factors,
    make_base,
    metrics,
    process,
    write_run,
)
from safetensors.numpy import load_file
from safetensors.torch import load_file as load_torch

import droplora_jax as dl
from droplora_jax import cli
from droplora_jax.core.errors import InputError
from droplora_jax.data.config import DataConfig
from droplora_jax.data.load import load as load_rows
from droplora_jax.hf.tokenizer import load_tokenizer
from droplora_jax.runs import config_reader
from droplora_jax.runs.folder import changed_keys, previous_config


@pytest.fixture(scope="module")
def folder(base, tmp_path_factory):
    """A run whose validation gets worse all the time, so that the best is not the last."""
    folder = tmp_path_factory.mktemp("run")
    other = [{"instruction": f"odd? {n}", "output": f"{n}{n} zz"} for n in range(100, 110)]
    valid = write_jsonl(folder / "other.jsonl", other)
    assert cli.main(["train", str(write_run(base, folder, data={"valid": valid}))]) == 0
    return folder / "run"


def merged_tensors(path) -> dict[str, torch.Tensor]:
    return {
        name: value
        for file in sorted(path.glob("*.safetensors"))
        for name, value in load_torch(file).items()
    }


def test_peft_is_the_adapter_of_the_run(folder, droplora, tmp_path):
    droplora.good("export", folder, "--to", tmp_path / "out", "--format", "peft")
    assert contents(tmp_path / "out") == contents(folder / "adapter")


def test_the_template_that_was_used_is_written_down(folder):
    own = json.loads((folder / "adapter" / "droplora_config.json").read_text())
    assert (own["template"], own["seed"]) == ("alpaca", 7)
    assert (own["drop_rate"], own["granularity"]) == (0.5, "token")


def test_merged_is_base_and_adapter(folder, base, droplora, tmp_path):
    """Against PEFT: the same adapter on the same base, merged there."""
    out = droplora.good("export", folder, "--to", tmp_path / "out", "--format", "merged")
    assert "10 of 21 tensors merged" in out
    model = transformers.AutoModelForCausalLM.from_pretrained(base)
    other = peft.PeftModel.from_pretrained(model, folder / "adapter").merge_and_unload()
    expected = other.state_dict()
    tensors = merged_tensors(tmp_path / "out")
    assert tensors.keys() == expected.keys()
    for name, value in tensors.items():
        torch.testing.assert_close(value, expected[name], rtol=1e-6, atol=1e-6)
    plain = merged_tensors(base)
    assert sum(not torch.equal(value, plain[name]) for name, value in tensors.items()) == 10


def test_the_evaluation_loss_is_that_of_the_exported_model_in_transformers(
    folder, droplora, tmp_path
):
    droplora.good("export", folder, "--to", tmp_path / "out", "--format", "merged")
    model = transformers.AutoModelForCausalLM.from_pretrained(tmp_path / "out")
    tokenizer = transformers.AutoTokenizer.from_pretrained(tmp_path / "out")
    config = config_reader.read(folder / "config.yaml")
    rows, _ = load_rows(config.data.valid, tokenizer, config.data)
    total, count = 0.0, 0
    for row in rows:
        with torch.no_grad():
            logits = model(torch.tensor(row.ids[None]).long()).logits[0]
        losses = torch.nn.functional.cross_entropy(
            logits[:-1], torch.tensor(row.ids[1:]).long(), reduction="none"
        )
        total += float(losses[torch.tensor(row.trained[1:])].sum())
        count += int(row.trained[1:].sum())
    last = [line for line in metrics(folder) if "eval_loss" in line][-1]
    assert len(rows) == 10 < 16  # the last batch of the evaluation is not full
    np.testing.assert_allclose(last["eval_loss"], total / count, rtol=1e-4)


def test_which_step(folder, droplora, tmp_path):
    evaluated = {row["step"]: row["eval_loss"] for row in metrics(folder) if "eval_loss" in row}
    assert min(evaluated, key=evaluated.get) == 4

    def exported(step):
        target = tmp_path / str(step)
        droplora.good("export", folder, "--to", target, "--format", "peft", "--step", step)
        return factors(target)

    by_step = {step: exported(step) for step in ("last", "best", 4, 8, 12)}
    for one, other, same in [("last", 12, True), ("best", 4, True), (4, 8, False), (8, 12, False)]:
        equal = all(np.array_equal(by_step[one][n], by_step[other][n]) for n in by_step[one])
        assert equal is same


@pytest.mark.parametrize("dtype", ["bfloat16", "float32"])
def test_dtype(folder, droplora, tmp_path, dtype):
    target = tmp_path / "out"
    droplora.good("export", folder, "--to", target, "--format", "merged", "--dtype", dtype)
    tensors = merged_tensors(target)
    assert {value.dtype for value in tensors.values()} == {getattr(torch, dtype)}
    assert json.loads((target / "config.json").read_text())["dtype"] == dtype


def test_a_run_on_a_bfloat16_base_is_exported_in_bfloat16(tmp_path, droplora, monkeypatch):
    use(monkeypatch)
    base = make_base(tmp_path / "base", dtype=torch.bfloat16)
    yaml = write_run(base.path, tmp_path, model={"dtype": "bfloat16"}, train={"steps": 4})
    droplora.good("train", yaml)
    droplora.good("export", tmp_path / "run", "--to", tmp_path / "out", "--format", "merged")
    assert {v.dtype for v in merged_tensors(tmp_path / "out").values()} == {torch.bfloat16}
    tensors = load_file(tmp_path / "run" / "adapter" / "adapter_model.safetensors")
    assert {value.dtype for value in tensors.values()} == {np.dtype(np.float32)}


def test_an_export_may_be_loaded_as_a_model_and_an_adapter(folder, base, droplora, tmp_path):
    droplora.good("export", folder, "--to", tmp_path / "out", "--format", "merged")
    tokens = jnp.arange(4, 4 + LENGTH)[None]
    with_adapter = dl.load_adapter(dl.load(base, dtype="float32"), folder / "adapter")
    expected = np.asarray(with_adapter(tokens))
    merged = np.asarray(dl.load(tmp_path / "out", dtype="float32")(tokens))
    plain = np.asarray(dl.load(base, dtype="float32")(tokens))
    assert np.linalg.norm(merged - expected) < 1e-5 * np.linalg.norm(expected)
    assert np.linalg.norm(merged - plain) > 1e-2 * np.linalg.norm(plain)


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--step", "5"], "step 5: there are last, best, 4, 8, 12"),
        (["--step", "first"], "step first: there are last, best, 4, 8, 12"),
        (["--format", "peft", "--dtype", "bfloat16"], "--dtype bfloat16: only for --format merged"),
    ],
)
def test_what_can_not_be_exported(folder, droplora, tmp_path, arguments, message):
    before = contents(folder)
    arguments = arguments if "--format" in arguments else [*arguments, "--format", "merged"]
    result = droplora("export", folder, "--to", tmp_path / "out", *arguments)
    assert result.code == 2
    assert message in result.err
    assert result.err.count("\n") == 1
    assert list(tmp_path.iterdir()) == []
    assert contents(folder) == before


def test_an_output_that_holds_something(folder, droplora, tmp_path):
    (tmp_path / "notes.txt").write_text("mine")
    for format in ("merged", "peft"):
        result = droplora("export", folder, "--to", tmp_path, "--format", format)
        assert result.code == 2
        assert f"{tmp_path}: exists and is not empty; nothing is overwritten" in result.err
    assert contents(tmp_path).keys() == {"notes.txt"}


def test_no_run(base, droplora, tmp_path):
    for source in (base, tmp_path / "nothing"):
        result = droplora("export", source, "--to", tmp_path / "out", "--format", "peft")
        assert result.code == 2
        assert f"{source}: no run of droplora in it (no config.yaml)" in result.err
    assert list(tmp_path.iterdir()) == []


def test_reading_a_run_leaves_it_alone_while_it_saves(folder, droplora, tmp_path):
    """An export while the run goes on must not clear away the checkpoint that it is writing."""
    source = shutil.copytree(folder, tmp_path / "run")
    saving = source / "checkpoints" / "step_16.orbax-checkpoint-tmp"
    shutil.copytree(source / "checkpoints" / "step_12", saving)
    before = contents(source)
    droplora.good("export", source, "--to", tmp_path / "out", "--format", "peft")
    time.sleep(2)  # what Orbax clears away, it clears away in the background
    assert contents(source) == before


def test_a_run_that_may_only_be_read(folder, droplora, tmp_path):
    """Nothing in it is touched."""
    before = {path: path.stat().st_mtime_ns for path in [folder, *folder.rglob("*")]}
    droplora.good("export", folder, "--to", tmp_path / "out", "--format", "peft")
    assert {path: path.stat().st_mtime_ns for path in [folder, *folder.rglob("*")]} == before


def test_a_run_without_a_checkpoint(folder, droplora, tmp_path):
    """Reading leaves nothing behind, not even an empty folder."""
    source = tmp_path / "run"
    source.mkdir()
    (source / "config.yaml").write_bytes((folder / "config.yaml").read_bytes())
    result = droplora("export", source, "--to", tmp_path / "out", "--format", "peft")
    assert result.code == 2
    assert "no complete checkpoint" in result.err
    assert contents(tmp_path).keys() == {"run", "run/config.yaml"}


# --- which settings may change --------------------------------------------------------------------


def changed(old: dict, new: dict) -> list[str]:
    least = {"model": {"path": "a"}, "output": "o", "data": {"train": "t"}}
    config = [
        config_reader.as_tree(config_reader._checked({**least, **values}, "run.yaml", set()))
        for values in (new, old)
    ]
    return changed_keys(*config)


def test_how_long_how_often_and_where_may_change():
    new = {
        "train": {
            "epochs": 2.0,
            "eval_every": 7,
            "save_every": 7,
            "log_every": 7,
            "keep": 7,
            "micro_batch": 64,
            "remat": "dots",
        },
        "model": {"path": "a", "attention": "blockwise"},
        "mesh": {"data": 4},
    }
    assert changed({}, new) == []
    assert changed({"train": {"epochs": 2.0}}, {"train": {"steps": 8}}) == []


def test_nothing_else_may():
    old = {"adapter": {"rank": 4}, "optim": {"options": {"b2": 0.9}}}
    new = {
        "seed": 1,
        "optim": {"options": {"b1": 0.5}},
        "data": {"train": ["t", "u"]},
        "train": {"global_batch": 64},
    }
    assert changed(old, new) == [
        "adapter.rank: 4 -> 32",
        "data.train: 't' -> ['t', 'u']",
        "optim.options.b1: None -> 0.5",
        "optim.options.b2: 0.9 -> None",
        "seed: 0 -> 1",
        "train.global_batch: 128 -> 64",
    ]


def test_a_folder_of_someone_else_is_left_alone(tmp_path):
    (tmp_path / "thesis.tex").write_text("x")
    with pytest.raises(InputError, match="exists and is not empty; nothing is overwritten"):
        previous_config(tmp_path)
    (tmp_path / "config.yaml").write_text("model: [")
    with pytest.raises(InputError, match="holds a config.yaml that is not a run's"):
        previous_config(tmp_path)
    assert previous_config(tmp_path / "new") is None


# From an adapter that is there.


def started(folder, base, target, **sections):
    model = {"path": str(base), "adapter": str(folder / "adapter")}
    return write_run(base, target, model=model, **sections)


def test_a_run_goes_on_from_an_adapter(folder, base, droplora, tmp_path, monkeypatch):
    """With the adapter's own shape, and the run's way of dropping ranks; and it resumes."""
    use(monkeypatch, FakeStep(change=0.0))
    file = started(folder, base, tmp_path, optim={"warmup_steps": 0}, adapter={"drop_rate": 0.25})
    droplora.good("train", file, "train.steps=1")
    config = config_reader.read(tmp_path / "run" / "config.yaml").adapter
    theirs = config_reader.read(folder / "config.yaml").adapter
    assert config == dataclasses.replace(theirs, drop_rate=0.25)
    before, after = factors(folder / "adapter"), factors(tmp_path / "run" / "adapter")
    for name, value in before.items():
        np.testing.assert_allclose(after[name], value, atol=1e-6)
    assert any(value.any() for name, value in before.items() if "lora_B" in name)
    assert "finished already" in droplora.good("train", file, "train.steps=1")
    droplora.good("train", file, "train.steps=2")
    assert metrics(tmp_path / "run")[-1]["step"] == 2


def test_options_that_contradict_the_adapter(folder, base, droplora, tmp_path):
    file = started(folder, base, tmp_path)
    result = droplora("train", file, "adapter.rank=7")
    assert result.code == 2
    assert "adapter.rank=7: the adapter in model.adapter=" in result.err
    assert "leave the key out" in result.err
    assert not (tmp_path / "run").exists()
    result = droplora("train", file, "model.adapter=/nowhere")
    assert result.code == 2
    assert "/nowhere: no such folder" in result.err


def test_dora_from_the_command_line(base, droplora, tmp_path):
    adapter = {
        "kind": "dora",
        "rank": 4,
        "train_whole": ["final_norm"],
        "rank_pattern": {r"\.0\.q": 2},
    }
    file = write_run(base, tmp_path, adapter=adapter)
    droplora.good("train", file, "train.steps=3")
    out = droplora.good("export", tmp_path / "run", "--to", tmp_path / "out", "--format", "peft")
    assert "DoRA (use_dora), modules trained whole (modules_to_save)" in out
    droplora.good("export", tmp_path / "run", "--to", tmp_path / "merged", "--format", "merged")
    theirs = peft.PeftModel.from_pretrained(
        transformers.AutoModelForCausalLM.from_pretrained(base), tmp_path / "out"
    ).merge_and_unload()
    merged = merged_tensors(tmp_path / "merged")
    moved = 0
    for name, value in transformers.AutoModelForCausalLM.from_pretrained(base).state_dict().items():
        torch.testing.assert_close(merged[name], theirs.state_dict()[name], rtol=1e-5, atol=1e-6)
        moved += not torch.equal(merged[name], value)
    assert moved == 10 + 1


@pytest.mark.parametrize(("number", "code"), [(signal.SIGINT, 130), (signal.SIGTERM, 143)])
def test_an_export_that_is_stopped_leaves_nothing(folder, tmp_path, number, code):
    """When all is written but not yet checked, and with JAX's threads at work."""
    checking = tmp_path / "checking.py"
    checking.write_text(
        "from droplora_jax import cli\n"
        "from droplora_jax.hf import merged\n"
        "probe = merged.probe\n"
        "def forever(*arguments):\n"
        "    print('checking', flush=True)\n"
        "    while True:\n"
        "        probe(*arguments)\n"
        "merged.probe = forever\n"
        "cli.command()\n"
    )
    out = tmp_path / "new" / "out"
    arguments = ("export", folder, "--to", out, "--format", "merged")
    export = process(*arguments, program=[str(checking)])
    assert any("checking" in line for line in export.stdout)
    assert len(list(out.parent.iterdir())) == 1
    export.send_signal(number)
    _, error = export.communicate()
    assert export.returncode == code, error
    assert error.splitlines()[-1] in ("droplora: interrupted", "droplora: terminated")
    assert list(out.parent.iterdir()) == []


# --- a dry run ------------------------------------------------------------------------------------


def test_a_dry_run_shows_the_data_and_writes_nothing(base, droplora, tmp_path, monkeypatch):
    def loaded(*_, **__):
        raise AssertionError("the weights were loaded")

    monkeypatch.setattr("droplora_jax.hf.base.Base.load", loaded)
    file = write_run(base, tmp_path, data={"packing": True, "max_length": 128}, train={"steps": 20})
    before = contents(tmp_path)
    out = droplora.good("train", file, "--dry-run", "train.global_batch=8")
    assert contents(tmp_path) == before
    train = tmp_path / "data" / "train.jsonl"
    assert f"40 rows from {train} (alpaca, template alpaca)\n40 rows to train on; 0 cut" in out
    found = re.search(r"\n(\d+) lines of 128 tokens an epoch, ([\d.]+)% full \(first_fit\)\n", out)
    rows, report = load_rows(train, load_tokenizer(base), DataConfig(str(train), max_length=128))
    lines = int(found[1])
    assert -(-report.tokens // 128) <= lines < len(rows)
    assert float(found[2]) == pytest.approx(100 * report.tokens / (128 * lines), abs=0.05)
    assert f"\n20 steps of 8 lines: {160 / lines:.2f} epochs of {report.tokens:,} tokens\n" in out
    assert "[[the answer is " in out
    assert out.endswith("a dry run: no weights were loaded, and there is no run yet\n")


def test_a_dry_run_refuses_what_a_run_refuses(base, droplora, tmp_path):
    file = write_run(base, tmp_path, optim={"warmup_steps": 13})
    wrong = droplora("train", file), droplora("train", "--dry-run", file)
    assert wrong[0].code == wrong[1].code == 2
    assert wrong[0].err == wrong[1].err
    assert "warmup_steps" in wrong[0].err


def test_a_dry_run_of_a_finished_run(folder, droplora):
    before = contents(folder)
    out = droplora.good("train", folder.parent / "run.yaml", "--dry-run")
    assert "a dry run" in out
    assert contents(folder) == before


def test_a_schedule_that_is_laid_out_anew_is_said_with_both_values(folder, droplora):
    file = folder.parent / "run.yaml"
    taken = [row for row in metrics(folder) if "learning_rate" in row][-1]
    config = config_reader.read(folder / "config.yaml")
    steps, warmup, peak = taken["step"], config.optim.warmup_steps, config.optim.learning_rate
    following = peak * (1 - (steps - warmup) / (2 * steps - warmup))
    said = (
        f"warning: the learning rate (optim.schedule=linear) was laid out over {steps} steps and is "
        f"now over {2 * steps}: it goes from {taken['learning_rate']:.3g} at step {steps} to "
        f"{following:.3g} at step {steps + 1}\n"
    )
    assert said in droplora.good("train", file, "--dry-run", f"train.steps={2 * steps}")
    assert "warning" not in droplora.good("train", file, "--dry-run")


def test_columns_stand_in_the_yaml(base, droplora, tmp_path):
    train = write_jsonl(tmp_path / "qa.jsonl", [{"q": "Q", "a": "A"}])
    file = write_run(base, tmp_path, data={"train": train, "valid": ..., "template": "none"})
    result = droplora("train", file, "--dry-run")
    assert (result.code, "no format has the keys q, a" in result.err) == (2, True)
    columns = {"prompt": "q", "completion": "a"}
    file = write_run(
        base, tmp_path, data={"train": train, "valid": ..., "template": "none", "columns": columns}
    )
    assert "(prompt_completion, template none)" in droplora.good("train", file, "--dry-run")
    assert config_reader.read(file) == config_reader.read(
        write_text(tmp_path / "again.yaml", config_reader.dump(config_reader.read(file)))
    )
    named = droplora("train", file, "--dry-run", "data.columns.promt=q")
    assert "command line: data.columns.promt='q': no format reads this key" in named.err


def write_text(file, text):
    file.write_text(text)
    return file
