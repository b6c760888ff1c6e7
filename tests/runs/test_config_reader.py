"""A run's YAML: strict, every mistake named with its file, key, value, rule and nearest name."""

from __future__ import annotations

import dataclasses
from pathlib import Path

import pytest

from droplora_jax.adapters.droplora import DropLoRA
from droplora_jax.core.config import MeshConfig
from droplora_jax.core.errors import InputError
from droplora_jax.data.config import DataConfig, Part
from droplora_jax.runs import config_reader
from droplora_jax.runs.config import BaseConfig, RunConfig
from droplora_jax.training.config import OptimConfig, TrainConfig

LEAST = "model: {path: base}\noutput: out\ndata: {train: a.jsonl}\n"
TASKS = Path(__file__).parents[2] / "examples" / "tasks"


@pytest.fixture
def read(tmp_path):
    def read(text: str = "", *overrides: str, least: str = LEAST) -> RunConfig:
        file = tmp_path / "run.yaml"
        file.write_text(least + text, encoding="utf-8")
        return config_reader.read(file, overrides)

    return read


def test_what_is_left_out_is_the_recipe_of_the_published_numbers(read):
    config = read()
    assert config.adapter == DropLoRA()
    assert config.optim == OptimConfig()
    assert config.train == TrainConfig()
    assert config.mesh == MeshConfig()
    assert config.data == DataConfig(train="a.jsonl")
    published = {
        "rank": 32,
        "alpha": 64.0,
        "drop_rate": 0.5,
        "granularity": "token",
        "sampler": "bernoulli",
        "rescale": True,
    }
    assert dataclasses.asdict(config.adapter).items() >= published.items()
    assert (config.optim.name, config.optim.learning_rate) == ("adamw", 3e-4)
    assert (config.optim.warmup_steps, config.optim.weight_decay) == (100, 0.1)
    assert (config.optim.schedule, config.train.global_batch) == ("linear", 128)


@pytest.mark.parametrize("value", ["3e-4", "3.0e-4", "0.0003", "3E-4", "+3e-4"])
def test_a_number_in_any_spelling_is_a_number(read, value):
    assert read(f"optim: {{learning_rate: {value}}}").optim.learning_rate == 3e-4


def test_a_whole_number_stands_for_a_float(read):
    config = read("adapter: {alpha: 16}\noptim: {clip_norm: 1}")
    assert (config.adapter.alpha, config.optim.clip_norm) == (16.0, 1.0)


def test_one_file_or_several_and_targets(read):
    text = "adapter: {targets: [q_proj$, v_proj$]}"
    config = read(text, "data.valid=[b.jsonl, c.jsonl]")
    assert config.data.valid == ("b.jsonl", "c.jsonl")
    assert config.adapter.targets == ("q_proj$", "v_proj$")


SOURCES = "model: {path: base}\noutput: out\ndata:\n  train:\n"


def test_sources_with_weights(read):
    text = (
        SOURCES + "    - {path: a.jsonl, weight: 3}\n    - {path: b, weight: 0.5, template: chat}\n"
    )
    config = read(least=text)
    assert config.data.train == (Part("a.jsonl", 3.0), Part("b", 0.5, template="chat"))
    assert config.data.weights == (3.0, 0.5)
    assert read(least=config_reader.dump(config)) == config


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("    - {path: a, wieght: 3}", "data.train.0.wieght=3: unknown key; did you mean weight?"),
        ("    - a\n    - {path: b, weight: x}", "data.train.1.weight='x': must be a valid number"),
        ("    - {weight: 3}", "data.train.0.path is missing"),
        ("    - 3", "data.train.0=3: must be a valid string or must be an object"),
        ("    - {path: a, format: alpcaa}", "data.train: a: format='alpcaa': must be one of"),
    ],
)
def test_a_mistake_in_a_source_is_named_once(read, text, message):
    with pytest.raises(InputError) as error:
        read(least=SOURCES + text)
    assert message in str(error.value)
    assert str(error.value).count("\n") == 0


def test_a_missing_key_beside_an_unknown_one_is_named_once(read):
    with pytest.raises(InputError) as error:
        read(least=SOURCES + "    - {pth: a}")
    assert [line.count("is missing") for line in error.value.problems] in ([0, 1], [1, 0])


def test_what_is_dumped_is_complete_and_reads_the_same(read, tmp_path):
    config = read(
        "adapter: {targets: [a, b], drop_rate: 0.25}\noptim: {options: {b2: 0.95}, clip_norm: null}"
    )
    file = tmp_path / "again.yaml"
    file.write_text(config_reader.dump(config), encoding="utf-8")
    assert config_reader.read(file) == config
    for section in ("model", "adapter", "data", "optim", "train", "mesh"):
        fields = {field.name for field in dataclasses.fields(getattr(config, section))}
        assert config_reader.as_tree(config)[section].keys() == fields


@pytest.mark.parametrize("task", sorted(TASKS.glob("*.yaml")), ids=lambda path: path.stem)
def test_the_task_files_can_be_read(task):
    assert (
        config_reader.read(task, ["model.path=base", "data.train=a.json", "output=out"]).output
        == "out"
    )


# --- overrides ------------------------------------------------------------------------------------


def test_overrides_win_and_make_sections(read):
    config = read(
        "optim: {learning_rate: 1.0, name: lion}",
        "optim.learning_rate=3e-4",
        "train.steps=7",
        "output=else where",
        "seed=3",
    )
    assert (config.optim.learning_rate, config.optim.name) == (3e-4, "lion")
    assert (config.train.steps, config.output, config.seed) == (7, "else where", 3)


@pytest.mark.parametrize("null", ["null", "~", ""])
def test_null_takes_a_value_away(read, null):
    assert read("", f"optim.clip_norm={null}").optim.clip_norm is None


def test_lists_and_maps(read):
    config = read("", "data.train=[a, b]", "optim.options={b1: 0.8}", "optim.options.b2=0.9")
    assert config.data.train == ("a", "b")
    assert config.optim.options == {"b1": 0.8, "b2": 0.9}


def test_a_value_may_hold_an_equals_sign(read):
    assert read("", "data.train=a=b.jsonl").data.train == "a=b.jsonl"


@pytest.mark.parametrize(
    ("override", "message"),
    [
        ("optim.learning_rate", "command line: 'optim.learning_rate': an override is section.key"),
        ("=3", "command line: '=3': an override is"),
        ("optm.learning_rate=1", r"command line: optm.*: unknown key; did you mean optim\?"),
        ("optim.learning_rat=1", r"command line: optim.learning_rat=1: .*mean learning_rate\?"),
        ("optim.learning_rate=x", "command line: optim.learning_rate='x': must be a valid number"),
        ("output.deep=1", "command line: output.deep=1: output is not a section"),
        ("data.train=[a", r"command line: data.train=\[a: not a YAML value"),
        ("adapter.rank=0", "command line: adapter.rank=0: must be at least 1"),
        ("optim.=1", "command line: .*optim.*unknown key"),
    ],
)
def test_an_override_that_can_not_be(read, override, message):
    with pytest.raises(InputError, match=message):
        read("", override)


# --- mistakes -------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("adaptor: {rank: 4}", r"adaptor=.*: unknown key; did you mean adapter\?"),
        ("adapter: {rnak: 4}", r"adapter\.rnak=4: unknown key; did you mean rank\?"),
        ("train: {zzzzzz: 4}", r"train\.zzzzzz=4: unknown key; there are steps, epochs"),
        ("adapter: {rank: four}", r"adapter\.rank='four': must be a valid integer"),
        ("adapter: {rank: true}", r"adapter\.rank=True: must be a valid integer"),
        ("adapter: {rank: 4.5}", r"adapter\.rank=4\.5: must be a valid integer"),
        ("adapter: {rank: 4.0}", r"adapter\.rank=4\.0: must be a valid integer"),
        ("adapter: {rank: '4'}", r"adapter\.rank='4': must be a valid integer"),
        ("adapter: {rank: null}", r"adapter\.rank=None: must be a valid integer"),
        ("adapter: {rank: [4]}", r"adapter\.rank=\[4\]: must be a valid integer"),
        ("adapter: {alpha: true}", r"adapter\.alpha=True: must be a valid number"),
        ("adapter: {rescale: 1}", r"adapter\.rescale=1: must be a valid boolean"),
        ("adapter: {rescale: yes}", r"adapter\.rescale='yes': must be a valid boolean"),
        ("adapter: {kind: lora}", r"adapter\.kind='lora': must be 'droplora' or 'dora'"),
        ("adapter: {granularity: tokens}", r"granularity='tokens': must be 'token', 'sequence' or"),
        ("adapter: {targets: 3}", r"adapter\.targets=3: must be"),
        ("adapter: 3", r"adapter=3: must be"),
        ("adapter: null", r"adapter=None: must be"),
        ("optim: {learning_rate: fast}", r"optim\.learning_rate='fast': must be a valid number"),
        ("optim: {learning_rate: '3e-4'}", r"optim\.learning_rate='3e-4': must be a valid number"),
        ("optim: {learning_rate: -1.0}", r"optim\.learning_rate=-1\.0: must be positive"),
        ("optim: {learning_rate: .nan}", r"optim\.learning_rate=nan"),
        ("optim: {options: {b1: [1]}}", r"optim\.options\.b1=\[1\]: must be"),
        ("seed: 1.5", r"seed=1\.5: must be a valid integer"),
        ("seed: -1", r"seed=-1: must"),
        ("seed: 2024-01-01", r"seed=.*2024-01-01.*: must be a valid integer"),
        (
            "adapter: {kind: learned, drop_rate: 0.5}",
            r"adapter\.drop_rate=0\.5: 'learned' has no such option; of kind droplora or dora it is",
        ),
        ("adapter: {kind: learned, granularty: x}", r"granularty='x': unknown key; there are kind"),
        ("adapter: {init: svd}", r"adapter\.init='svd': must be 'kaiming', 'gaussian', "),
        (
            "adapter: {drop_schedule: up}",
            r"adapter\.drop_schedule='up': must be 'constant', 'linear'",
        ),
        ("adapter: {rank: 0}", r"adapter\.rank=0: must be at least 1"),
        ("adapter: {drop_rate: 1.0}", r"adapter\.drop_rate=1\.0: must be at least 0 .* below 1"),
        ("adapter: {drop_rate: -0.1}", r"adapter\.drop_rate=-0\.1"),
        ("adapter: {rank: 1, sampler: exact, drop_rate: 0.9}", r"keeps no rank of 1"),
        ("train: {steps: 0}", r"train\.steps=0: must be at least 1"),
        ("train: {keep: 0}", r"train\.keep=0: must be at least 1"),
        ("train: {epochs: -1}", r"train\.epochs=-1.*: must be positive"),
        ("train: {steps: 2, epochs: 1}", "train.steps and epochs are both given"),
        ("train: {global_batch: 10, micro_batch: 4}", "global_batch=10 is not divisible by .*=4"),
        ("mesh: {fsdp: 0}", r"mesh\.fsdp=0: must be positive, or -1"),
        ("mesh: {data: -1}", "only one axis may be -1"),
    ],
)
def test_a_mistake_is_named(read, tmp_path, text, message):
    with pytest.raises(InputError, match=message) as caught:
        read(text)
    assert str(caught.value).startswith(f"{tmp_path / 'run.yaml'}: ")


def test_every_mistake_is_named_at_once(read):
    with pytest.raises(InputError) as caught:
        read(
            "adapter: {rank: four, alhpa: 1}\nseed: x\ntrain: {steps: 0, keep: 0, sav_every: 1}\n"
            "optim: {clip_norm: 0.0, warmup_steps: -1}\nmesh: {fsdp: 0}",
            "optim.b_ratio=0",
        )
    lines = str(caught.value).splitlines()
    file, line = ("run.yaml: ", "command line: ")
    for key, where in {
        "adapter.rank='four'": file,
        "adapter.alhpa=1": file,
        "seed='x'": file,
        "train.sav_every=1: unknown key; did you mean save_every?": file,
        "train.steps=0: must be at least 1": file,
        "train.keep=0: must be at least 1": file,
        "optim.clip_norm=0.0: must be positive": file,
        "optim.warmup_steps=-1: must not be negative": file,
        "optim.b_ratio=0.0: must be positive": line,
        "mesh.fsdp=0: must be positive": file,
    }.items():
        assert sum(f"{where}{key}" in shown for shown in lines) == 1, key
    assert len(lines) == 10


@pytest.mark.parametrize(
    ("least", "missing"),
    [
        ("output: out\ndata: {train: a}\n", "model is missing"),
        ("model: {path: a}\ndata: {train: a}\n", "output is missing"),
        ("model: {path: a}\noutput: out\n", "data is missing"),
        ("model: {dtype: auto}\noutput: out\ndata: {train: a}\n", r"model\.path is missing"),
        ("model: {path: a}\noutput: out\ndata: {valid: a}\n", r"data\.train is missing"),
    ],
)
def test_a_key_that_must_be_there(read, least, missing):
    with pytest.raises(InputError, match=missing):
        read(least=least)


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("model: [", "can't be read as YAML"),
        ("a: b: c", "can't be read as YAML .*line 1"),
        ("\tmodel: x", "can't be read as YAML"),
        ("- a\n- b", "must hold keys and values"),
        ("just words", "must hold keys and values"),
        ("", "must hold keys and values"),
        (LEAST + "output: other\n", "can't be read as YAML .*duplicate key.*output"),
        (LEAST + "---\n" + LEAST, "can't be read as YAML"),
        (LEAST + "optim: !!python/object:os.system {}\n", "can't be read as YAML"),
        (LEAST + "1: 2\n", "unknown key"),
    ],
)
def test_text_that_is_no_run(read, text, message):
    with pytest.raises(InputError, match=message):
        read(least=text)


def test_a_file_that_can_not_be_read(tmp_path):
    with pytest.raises(InputError, match=r"none\.yaml: no such file"):
        config_reader.read(tmp_path / "none.yaml")
    with pytest.raises(InputError, match="can't be read as YAML"):
        config_reader.read(tmp_path)
    (tmp_path / "latin.yaml").write_bytes(LEAST.encode() + b"# \xe4\n")
    with pytest.raises(InputError, match="can't be read as YAML"):
        config_reader.read(tmp_path / "latin.yaml")


@pytest.mark.parametrize(
    ("dtype", "platform", "expected"),
    [
        ("auto", "cpu", "float32"),
        ("auto", "gpu", "bfloat16"),
        ("auto", "tpu", "bfloat16"),
        ("float32", "tpu", "float32"),
        ("bfloat16", "cpu", "bfloat16"),
    ],
)
def test_the_dtype_of_a_platform(dtype, platform, expected):
    assert BaseConfig(path="a", dtype=dtype).dtype_on(platform) == expected
