"""Bad input: exit code 2, one clear message, no traceback, and nothing written or changed."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
from data_fixtures import make_tokenizer, write_jsonl
from oracles import with_config
from run_fixtures import contents, make_base, rows, settings, write_run, write_yaml
from safetensors.numpy import load_file, save_file

from droplora_jax import cli
from droplora_jax.runs import config_reader


@pytest.fixture
def refused(droplora, tmp_path) -> Callable[..., str]:
    """Runs a command that must fail as documented; returns what it says."""

    def refused(*arguments: object) -> str:
        before = contents(tmp_path)
        result = droplora(*arguments)
        assert result.code == 2
        assert result.err.startswith("droplora: ")
        assert "Traceback" not in result.out + result.err
        assert contents(tmp_path) == before
        return result.err

    return refused


@pytest.fixture
def copy(base, tmp_path) -> Path:
    """The base's files, to be damaged."""
    return Path(shutil.copytree(base, tmp_path / "base"))


# --- the command line itself ----------------------------------------------------------------------


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ([], "COMMAND"),
        (["trian"], "invalid choice: 'trian'"),
        (["train"], "RUN.yaml"),
        (["export", "run", "--to", "x"], "--format"),
        (["export", "run", "--to", "x", "--format", "gguf"], "invalid choice: 'gguf'"),
        (["export", "run", "--to", "x", "--format", "merged", "--dtype", "int8"], "'int8'"),
    ],
)
def test_arguments_that_are_none(capsys, arguments, message):
    with pytest.raises(SystemExit) as caught:
        cli.main(arguments)
    assert caught.value.code == 2
    assert message in capsys.readouterr().err


@pytest.mark.parametrize("arguments", [["--help"], ["train", "--help"], ["export", "--help"]])
def test_help(capsys, arguments):
    with pytest.raises(SystemExit) as caught:
        cli.main(arguments)
    assert caught.value.code == 0
    assert "usage: droplora" in capsys.readouterr().out


def test_an_interrupt_while_loading(droplora, base, tmp_path, monkeypatch):
    def interrupted(*_, **__):
        raise KeyboardInterrupt

    monkeypatch.setattr("droplora_jax.hf.source.resolve", interrupted)
    result = droplora("train", write_run(base, tmp_path))
    assert (result.code, result.err) == (130, "droplora: interrupted\n")
    assert not (tmp_path / "run").exists()


# --- the model's folder ---------------------------------------------------------------------------


@pytest.mark.parametrize("path", ["/no/such/folder", "./nothing", "nothing"])
def test_no_model(refused, tmp_path, path):
    err = refused("train", write_run(path, tmp_path))
    assert err == f"droplora: model.path={path!r}: no such folder (a hub id is 'owner/name')\n"


def test_only_pickled_weights(refused, copy, tmp_path):
    for file in copy.glob("*.safetensors*"):
        file.unlink()
    (copy / "pytorch_model.bin").write_bytes(b"x")
    err = refused("train", write_run(copy, tmp_path))
    assert "only pickled weights (pytorch_model.bin)" in err
    assert "save_pretrained" in err


@pytest.mark.parametrize("keep", [0, 7, 400, -1])
def test_a_shard_that_is_cut_short(refused, copy, tmp_path, keep):
    shard = sorted(copy.glob("*.safetensors"))[1]
    shard.write_bytes(shard.read_bytes()[:keep])
    err = refused("train", write_run(copy, tmp_path))
    assert f"{shard}: broken or cut short" in err
    assert "download it again" in err


def test_a_shard_that_is_missing(refused, copy, tmp_path):
    shard = sorted(copy.glob("*.safetensors"))[0]
    shard.unlink()
    assert f"{shard}: missing; download it again" in refused("train", write_run(copy, tmp_path))


def test_another_architecture(refused, base, tmp_path):
    other = with_config(base, tmp_path / "other", model_type="gpt2")
    err = refused("train", write_run(other, tmp_path))
    assert "config.json: model_type='gpt2' is not supported; supported: llama" in err


def edit(copy: Path, name: str, change: Callable[[np.ndarray], np.ndarray | None]) -> Path:
    """Change or remove one tensor of a folder."""
    index_file = copy / "model.safetensors.index.json"
    index = json.loads(index_file.read_text())
    shard = copy / index["weight_map"][name]
    tensors = load_file(shard)
    tensors[name] = change(tensors[name])
    if tensors[name] is None:
        del tensors[name], index["weight_map"][name]
        index_file.write_text(json.dumps(index))
    save_file(tensors, shard, metadata={"format": "pt"})
    return shard


UP = "model.layers.1.mlp.up_proj.weight"


def test_a_tensor_that_is_missing(refused, copy, tmp_path):
    edit(copy, UP, lambda _: None)
    err = refused("train", write_run(copy, tmp_path))
    assert f"{copy}: 1 tensor(s) missing, such as {UP}" in err


def test_a_tensor_of_another_shape(refused, copy, tmp_path):
    shard = edit(copy, UP, lambda value: np.ascontiguousarray(value[:-1]))
    err = refused("train", write_run(copy, tmp_path))
    assert f"{shard}: {UP} has shape [47, 32], but config.json asks for [48, 32]" in err


def test_no_tokenizer(refused, copy, tmp_path):
    for file in copy.glob("tokenizer*"):
        file.unlink()
    err = refused("train", write_run(copy, tmp_path))
    assert err.startswith(f"droplora: {copy}: no tokenizer could be loaded from it (")


def test_a_tokenizer_that_is_broken(refused, copy, tmp_path):
    (copy / "tokenizer.json").write_text('{"version": "1.0"')
    err = refused("train", write_run(copy, tmp_path))
    assert f"{copy}: no tokenizer could be loaded from it (" in err


def test_a_tokenizer_of_a_larger_vocabulary(refused, tmp_path):
    small = make_base(tmp_path / "small", vocab_size=64).path
    err = refused("train", write_run(small, tmp_path))
    assert "is outside the model's vocabulary of 64" in err
    assert "tokenizer" in err


def test_a_tokenizer_without_an_end(refused, copy, tmp_path):
    for file in copy.glob("tokenizer*"):
        file.unlink()
    make_tokenizer(eos=None).save_pretrained(copy)
    assert "has no EOS token" in refused("train", write_run(copy, tmp_path))


# --- the configuration ----------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("sections", "message"),
    [
        ({"adaptor": {"rank": 4}}, "unknown key; did you mean adapter?"),
        ({"adapter": {"rnak": 4}}, "adapter.rnak=4: unknown key; did you mean rank?"),
        ({"adapter": {"rank": "four"}}, "adapter.rank='four': must be a valid integer"),
        ({"adapter": {"rank": True}}, "adapter.rank=True: must be a valid integer"),
        ({"adapter": {"rank": 4.5}}, "adapter.rank=4.5: must be a valid integer"),
        ({"adapter": {"rank": 0}}, "adapter.rank=0: must be at least 1"),
        ({"adapter": {"drop_rate": 1.0}}, "adapter.drop_rate=1.0: must be at least 0"),
        ({"adapter": {"targets": ["q_porj"]}}, "adapter.targets='q_porj' matches no module; "),
        ({"adapter": {"targets": ["q_(proj"]}}, "adapter.targets='q_(proj': not a regular"),
        ({"adapter": {"targets": []}}, "adapter.targets"),
        ({"optim": {"learning_rate": -0.1}}, "optim.learning_rate=-0.1: must be positive"),
        ({"optim": {"name": "adamv"}}, "optim.name='adamv'"),
        ({"optim": {"warmup_steps": 12}}, "optim.warmup_steps=12: must be below the run's 12"),
        ({"mesh": {"data": 3}}, "mesh data=3 x fsdp=-1 does not match the 8 device(s)"),
        ({"mesh": {"fsdp": 4}}, "mesh fsdp=4 does not match the 8 device(s)"),
        ({"train": {"micro_batch": 5}}, "train.global_batch=16 is not divisible by micro_batch=5"),
        ({"train": {"micro_batch": 4}}, "train.micro_batch=4 is not divisible by the 8 parts"),
        (
            {"train": {"global_batch": 12, "micro_batch": ...}},
            "train.global_batch=12 is not divisible by the 8 parts",
        ),
        ({"data": {"max_length": 129}}, "data.max_length=129: the model is made for 128 positions"),
        ({"data": {"max_length": 1}}, "data.max_length=1: must be at least 2"),
        ({"data": {"format": "alpacca"}}, "data.format='alpacca': must be one of"),
        ({"data": {"train": ...}}, "data.train is missing"),
        ({"output": ...}, "output is missing"),
        ({"seed": 2**64}, "seed=18446744073709551616: must be"),
    ],
)
def test_a_setting_that_can_not_be(refused, base, tmp_path, sections, message):
    assert message in refused("train", write_run(base, tmp_path, **sections))


def test_no_yaml(refused, tmp_path):
    assert "nothing.yaml: no such file" in refused("train", tmp_path / "nothing.yaml")
    (tmp_path / "run.yaml").write_text("model: [")
    assert "run.yaml: can't be read as YAML" in refused("train", tmp_path / "run.yaml")
    (tmp_path / "run.yaml").write_text("seed: 1\nseed: 2\n")
    assert "duplicate key" in refused("train", tmp_path / "run.yaml")


def test_a_wrong_override(refused, base, tmp_path):
    yaml = write_run(base, tmp_path)
    err = refused("train", yaml, "optim.learnin_rate=1")
    assert err.startswith("droplora: command line: optim.learnin_rate=1: unknown key; did you mean")
    assert "an override is section.key=value" in refused("train", yaml, "steps")


# --- the data -------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("lines", "message"),
    [
        (['{"instruction": "a", "output": "b"}', '{"instruction": '], "bad.jsonl:2: broken JSON"),
        (['{"instruction": "a", "output": "b"}', "", '{"instruction": "a"}'], "bad.jsonl:3: "),
        (['{"instruction": "a", "output": ""}'], "bad.jsonl:1: "),
        (['{"instruction": "a", "output": 3}'], "bad.jsonl:1: "),
        (["[1]"], "bad.jsonl, row 1: must be an object with keys"),
        ([], "bad.jsonl: the file is empty"),
    ],
)
@pytest.mark.parametrize("part", ["train", "valid"])
def test_a_file_that_does_not_fit(refused, base, tmp_path, part, lines, message):
    (tmp_path / "bad.jsonl").write_text("\n".join(lines))
    err = refused("train", write_run(base, tmp_path, data={part: str(tmp_path / "bad.jsonl")}))
    assert f"{tmp_path}/{message}" in err


def test_no_file(refused, base, tmp_path):
    path = str(tmp_path / "none.jsonl")
    assert f"{path}: no such file" in refused(
        "train", write_run(base, tmp_path, data={"train": path})
    )


def test_a_row_that_is_too_long(refused, base, tmp_path):
    short = [row for row in rows(20) if "input" not in row][:3]
    long = [*short, {"instruction": "odd?", "output": "the answer is true " * 40}]
    path = write_jsonl(tmp_path / "long.jsonl", long)
    err = refused("train", write_run(base, tmp_path, data={"train": path, "too_long": "error"}))
    assert f"{path}:4: " in err
    assert "tokens are more than data.max_length=72" in err


def test_no_row_that_teaches_anything(refused, base, tmp_path):
    err = refused("train", write_run(base, tmp_path, data={"max_length": 20}))
    assert "no row is left to train on" in err
    assert "data.max_length" in err


# --- the output -----------------------------------------------------------------------------------


def test_an_output_that_holds_something_else(refused, base, tmp_path):
    (tmp_path / "run").mkdir()
    (tmp_path / "run" / "thesis.tex").write_text("mine")
    err = refused("train", write_run(base, tmp_path))
    assert f"{tmp_path / 'run'}: exists and is not empty; nothing is overwritten" in err


def test_an_output_that_is_a_file(refused, base, tmp_path):
    (tmp_path / "run").write_text("mine")
    assert str(tmp_path / "run") in refused("train", write_run(base, tmp_path))


def test_an_output_below_a_file(refused, base, tmp_path):
    (tmp_path / "file").write_text("mine")
    output = str(tmp_path / "file" / "run")
    assert str(tmp_path / "file") in refused("train", write_run(base, tmp_path, output=output))


def test_someone_else_s_config_yaml(refused, base, tmp_path):
    """A folder with a config.yaml is not a run of ours for that alone."""
    (tmp_path / "run").mkdir()
    (tmp_path / "run" / "config.yaml").write_text("database: {port: 5432}\n")
    err = refused("train", write_run(base, tmp_path))
    assert str(tmp_path / "run") in err


# --- what may be left to the command line ---------------------------------------------------------


def test_overrides_are_written_down_with_everything_else(base, tmp_path, droplora):
    tree = settings(base, tmp_path, optim={"clip_norm": 1.0}, train={"steps": ...})
    yaml = write_yaml(tmp_path / "run.yaml", tree)
    train = tree["data"]["train"]
    droplora.good(
        "train",
        yaml,
        "train.steps=3",
        "optim.clip_norm=null",
        "optim.learning_rate=3e-4",
        f"data.train=[{train}, {train}]",
        "adapter.targets=[q_proj$, down_proj$]",
        f"output={tmp_path / 'other'}",
    )
    config = config_reader.read(tmp_path / "other" / "config.yaml")
    assert (config.train.steps, config.optim.clip_norm) == (3, None)
    assert (config.optim.learning_rate, config.data.train) == (3e-4, (train, train))
    peft = json.loads((tmp_path / "other" / "adapter" / "adapter_config.json").read_text())
    assert peft["target_modules"] == ["down_proj", "q_proj"]
    assert not (tmp_path / "run").exists()
