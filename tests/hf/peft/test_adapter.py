"""A folder of an adapter: what is written, what is refused, and what is said about it."""

from __future__ import annotations

import dataclasses
import json
import shutil
from pathlib import Path

import jax
import numpy as np
import peft
import pytest
from flax import nnx
from oracles import (
    Folder,
    assert_unchanged,
    model_folder,
    randomized,
    relative,
    snapshot,
    torch_logits,
)
from peft_models import TOKENS, Trained, in_peft, train_in_peft
from safetensors.numpy import load_file, save_file
from small_models import load

import droplora_jax as dl
from droplora_jax.adapters.surgery import adapters_of
from droplora_jax.core.config import MeshConfig
from droplora_jax.hf.peft.consumers import vllm_limits

KEY = dl.root_key(0)
OPTIONS = {"rank": 4, "alpha": 6.0}
TARGETS = ("q_proj", "down_proj$")


@nnx.jit
def forward(model, tokens):
    return model(tokens)


def adapted(base: nnx.Module, **options) -> nnx.Module:
    config = dl.DropLoRA(**{**OPTIONS, **options})
    return randomized(dl.inject(base, config, key=KEY), size=0.2)


# No test changes these models and folders.


@pytest.fixture(scope="module")
def base(untied: Folder) -> nnx.Module:
    return load(untied)


@pytest.fixture(scope="module")
def model(base) -> nnx.Module:
    return adapted(base)


@pytest.fixture(scope="module")
def saved(model, tmp_path_factory) -> Path:
    """The adapter of `model`."""
    folder = tmp_path_factory.mktemp("saved") / "adapter"
    dl.save_adapter(model, folder, extra={"template": "alpaca"})
    return folder


@pytest.fixture(scope="module")
def trained(tmp_path_factory) -> Trained:
    """A base with biases, and a LoRA with biases of PEFT's."""
    folder = model_folder(tmp_path_factory.mktemp("qwen2"), "qwen2")
    return train_in_peft(folder.path, tmp_path_factory.mktemp("trained"), bias="all")


@pytest.fixture(scope="module")
def qwen2(trained) -> nnx.Module:
    """The base of `trained`."""
    return load(trained.base)


@pytest.fixture
def copy(trained, tmp_path) -> Path:
    """A copy of the adapter of `trained` that a test may break."""
    return Path(shutil.copytree(trained.adapter, tmp_path / "copy"))


# What is written.


@pytest.mark.parametrize(("folder", "targets"), [("untied", "paper"), ("tied", "all-linear")])
def test_peft_loads_the_adapter(folder, targets, request, tmp_path):
    folder = request.getfixturevalue(folder)
    model = adapted(load(folder), targets=targets)
    dl.save_adapter(model, tmp_path / "out")
    theirs = in_peft(folder.path, tmp_path / "out")
    assert relative(torch_logits(theirs, TOKENS), forward(model, TOKENS)) < 1e-4
    # Nothing of it was left unused, and nothing is missing.
    stored = load_file(tmp_path / "out" / "adapter_model.safetensors")
    assert stored.keys() == peft.get_peft_model_state_dict(theirs).keys()
    assert {tensor.dtype for tensor in stored.values()} == {np.dtype(np.float32)}


def test_the_files_say_what_they_are(saved, untied):
    config = json.loads((saved / "adapter_config.json").read_text())
    assert config["base_model_name_or_path"] == str(untied.path.resolve())
    assert (config["peft_type"], config["r"], config["lora_alpha"]) == ("LORA", 4, 6)
    assert config["target_modules"] == ["down_proj", "k_proj", "q_proj", "up_proj", "v_proj"]
    assert config["inference_mode"] is True
    known = {field.name for field in dataclasses.fields(peft.LoraConfig)}
    assert config.keys() <= known  # PEFT warns about others
    own = json.loads((saved / "droplora_config.json").read_text())
    assert own["drop_rate"] == 0.5
    assert own["template"] == "alpaca"


@pytest.mark.parametrize(
    ("mesh", "options"),
    [
        (None, {"alpha": 0.3, "drop_rate": 0.0, "targets": TARGETS}),
        (
            MeshConfig(),
            {
                "drop_rate": 0.25,
                "granularity": "step",
                "sampler": "exact",
                "rescale": False,
                "targets": TARGETS,
            },
        ),
    ],
    ids=str,
)
def test_export_and_import_are_bit_identical_options_included(untied, mesh, options, tmp_path):
    base = load(untied, mesh)
    model = adapted(base, **options)
    dl.save_adapter(model, tmp_path / "out")
    before = snapshot(base)
    back = dl.load_adapter(base, tmp_path / "out")
    assert_unchanged(base, before)
    ours, theirs = adapters_of(model), adapters_of(back)
    assert ours.keys() == theirs.keys()
    for path, adapter in ours.items():
        assert theirs[path].config == adapter.config == dl.DropLoRA(**{**OPTIONS, **options})
        for name in ("lora_a", "lora_b"):
            a, b = (getattr(x, name).get_value() for x in (adapter, theirs[path]))
            np.testing.assert_array_equal(a, b)
            assert a.sharding.is_equivalent_to(b.sharding, a.ndim)
    np.testing.assert_array_equal(forward(back, TOKENS), forward(model, TOKENS))


def test_an_old_adapter_is_replaced_only_when_asked(model, tmp_path):
    dl.save_adapter(model, tmp_path / "out")
    with pytest.raises(dl.InputError, match="exists"):
        dl.save_adapter(model, tmp_path / "out")
    dl.save_adapter(randomized(model, seed=1), tmp_path / "out", replace=True)
    stored = load_file(tmp_path / "out" / "adapter_model.safetensors")
    a = adapters_of(randomized(model, seed=1))["layers.q_proj"].lora_a[...]
    name = "base_model.model.model.layers.2.self_attn.q_proj.lora_A.weight"
    np.testing.assert_array_equal(stored[name].T, jax.device_get(a)[2])


def test_no_adapters_nothing_to_save(base, tmp_path):
    with pytest.raises(dl.InputError, match="no adapters"):
        dl.save_adapter(base, tmp_path / "out")


@pytest.mark.parametrize(
    ("options", "reasons"),
    [
        ({}, []),
        ({"rank_stabilized": True}, []),
        ({"rank_pattern": {"q_proj": 2}}, []),
        ({"targets": ("q_proj", "embed")}, ["embed_tokens"]),
        ({"train_whole": ("lm_head",)}, ["modules_to_save"]),
        ({"train_whole": ("bias$",)}, ["bias"]),
    ],
    ids=str,
)
def test_what_vllm_does_not_serve_is_said(options, reasons, qwen2, tmp_path):
    """vLLM knows A and B of linear layers, and of the ends in some families."""
    config = dl.DropLoRA(**{"rank": 4, "targets": "q_proj", **options})
    model = dl.inject(qwen2, config, key=KEY)
    limits = dl.save_adapter(model, tmp_path / "out")
    assert len(limits) == len(reasons)
    assert all(reason in words for reason, words in zip(reasons, limits, strict=True))
    if not reasons:
        names = load_file(tmp_path / "out" / "adapter_model.safetensors")
        assert all(name.endswith((".lora_A.weight", ".lora_B.weight")) for name in names)
        written = json.loads((tmp_path / "out" / "adapter_config.json").read_text())
        assert vllm_limits(written) == []
        assert written["bias"] == "none"
        assert not written["modules_to_save"]


def test_biases_that_peft_has_no_word_for(qwen2, tmp_path):
    config = dl.DropLoRA(rank=4, targets="q_proj", train_whole=(r"layers\.k_proj\.bias",))
    model = dl.inject(qwen2, config, key=KEY)
    with pytest.raises(dl.InputError, match=r"train_whole.*layers\.k_proj\.bias"):
        dl.save_adapter(model, tmp_path / "out")
    assert list(tmp_path.iterdir()) == []


# What is read.


def test_loading_into_a_model_with_adapters_leaves_that_model_alone(base, model, saved):
    other = dl.inject(base, dl.DropLoRA(**OPTIONS), key=KEY)
    before = snapshot(other)
    loaded = dl.load_adapter(other, saved)
    np.testing.assert_array_equal(forward(loaded, TOKENS), forward(model, TOKENS))
    assert_unchanged(other, before)


@pytest.mark.parametrize("through", ["config", "model"])
def test_another_scale_than_the_adapter_was_trained_with_is_refused(base, saved, through):
    """It would be another function, silently."""
    config = dl.DropLoRA(rank=4, alpha=12.0)
    options = {"config": config} if through == "config" else {}
    given = dl.inject(base, config, key=KEY) if through == "model" else base
    with pytest.raises(dl.InputError, match=r"lora_alpha=6.*12"):
        dl.load_adapter(given, saved, **options)


def test_other_training_options_may_be_given(base, model, saved):
    config = dl.DropLoRA(**OPTIONS, drop_rate=0.1, granularity="step")
    loaded = dl.load_adapter(base, saved, config=config)
    assert {adapter.config for adapter in adapters_of(loaded).values()} == {config}
    np.testing.assert_array_equal(forward(loaded, TOKENS), forward(model, TOKENS))


def test_nothing_is_dropped_of_an_adapter_without_options_of_ours(qwen2, trained):
    model = dl.load_adapter(qwen2, trained.adapter)
    assert {adapter.config.drop_rate for adapter in adapters_of(model).values()} == {0.0}


UNSUPPORTED = {
    "peft_type": "IA3",
    "bias": "some",
    "fan_in_fan_out": True,
    "modules_to_save": ["lm_head"],
    "layer_replication": [[0, 2]],
    "trainable_token_indices": [1],
    "target_parameters": ["x"],
    "lora_bias": True,
    "use_qalora": True,
    # These change the base, or what is computed, and PEFT applies them on loading.
    "init_lora_weights": "pissa",
    "alora_invocation_tokens": [1],
    "use_bdlora": {"x": 1},
    "arrow_config": {"x": 1},
    "kasa_config": {"x": 1},
    "monteclora_config": {"x": 1},
    "a_field_of_the_future": 1,
}


@pytest.mark.parametrize("field", UNSUPPORTED)
def test_fields_that_are_not_understood_are_named(field, qwen2, copy):
    edit(copy, {}, **{field: UNSUPPORTED[field]})
    with pytest.raises(dl.InputError, match=rf"adapter_config\.json.*{field}"):
        dl.load_adapter(qwen2, copy)


@pytest.mark.parametrize("field", ["r", "lora_alpha", "peft_type"])
def test_fields_that_are_missing_are_named(field, qwen2, copy):
    file = copy / "adapter_config.json"
    config = json.loads(file.read_text())
    del config[field]
    file.write_text(json.dumps(config))
    with pytest.raises(dl.InputError, match=rf"adapter_config\.json.*{field}"):
        dl.load_adapter(qwen2, copy)


def test_an_adapter_of_another_base_or_a_folder_without_one(base, saved, tmp_path):
    with pytest.raises(dl.InputError, match=r"adapter_config\.json: missing"):
        dl.load_adapter(base, tmp_path)
    for options, message in [
        ({"targets": "q_proj"}, r"adapter_model\.safetensors.*no place"),
        ({"targets": "all-linear"}, r"adapter_model\.safetensors: lacks .*(gate|o)_proj"),
        ({"rank": 8, "alpha": 12.0}, r"\[4, \d+\].*\[8, \d+\]|r=4"),
    ]:
        other = dl.inject(base, dl.DropLoRA(**OPTIONS | options), key=KEY)
        with pytest.raises(dl.InputError, match=message):
            dl.load_adapter(other, saved)


def edit(folder: Path, tensors: dict, **fields) -> None:
    file, config = folder / "adapter_model.safetensors", folder / "adapter_config.json"
    kept = load_file(file) | tensors
    save_file({name: value for name, value in kept.items() if value is not None}, file)
    config.write_text(json.dumps(json.loads(config.read_text()) | fields))


MODULE = "base_model.model.model.layers.1.self_attn.q_proj"
BROKEN = {
    "unknown peft_type": ({}, {"peft_type": "VERA"}, r"peft_type='VERA'.*'LORA'"),
    "another base": (
        {f"{MODULE}.lora_A.weight": np.zeros((3, 40), np.float32)},
        {},
        r"lora_A\.weight has shape \[3, 40\], the model needs \[3, 32\].*another base",
    ),
    "more layers": (
        {MODULE.replace("1", "7") + ".lora_A.weight": np.zeros((3, 32), np.float32)},
        {},
        r"layers\.7.*another base",
    ),
    "a factor missing": ({f"{MODULE}.lora_B.weight": None}, {}, r"lacks .*lora_B\.weight"),
    "a bias missing": (
        {"base_model.model.model.layers.2.self_attn.k_proj.bias": None},
        {},
        r"k_proj\.bias is trained in 2 of 3 layers.*bias",
    ),
    "rank": ({}, {"r": 4}, r"lora_A\.weight has shape \[3, 32\], the model needs \[4, 32\]"),
    "not a target": ({}, {"target_modules": ["v_proj"]}, r"does not name .*q_proj.*target_modules"),
    "NaN": (
        {f"{MODULE}.lora_A.weight": np.full((3, 32), np.nan, np.float32)},
        {},
        r"layers\.1\.self_attn\.q_proj\.lora_A\.weight holds NaN or infinity",
    ),
    "embedding": (
        {"base_model.model.model.embed_tokens.lora_embedding_A": np.zeros((3, 64), np.float32)},
        {},
        r"lora_embedding_A is there.*does not name model\.embed_tokens in target_modules",
    ),
    "bias of B": (
        {f"{MODULE}.lora_B.bias": np.zeros(32, np.float32)},
        {},
        r"lora_B\.bias.*lora_bias.*can't be represented",
    ),
    "a module that is not there": (
        {},
        {"modules_to_save": ["lm_head"]},
        r"modules_to_save=\['lm_head'\].*no tensor",
    ),
    "a rank that is no number": ({}, {"r": "3"}, r"adapter_config\.json: r='3': must be"),
    "a pattern's rank": ({}, {"rank_pattern": {"q": 0}}, r"rank_pattern\.q=0: must be"),
}


@pytest.mark.parametrize("case", BROKEN)
def test_broken_adapters_are_named(case, qwen2, copy):
    tensors, fields, message = BROKEN[case]
    edit(copy, tensors, **fields)
    with pytest.raises(dl.InputError, match=message):
        dl.load_adapter(qwen2, copy)


def test_own_options_that_are_broken(qwen2, copy):
    model = dl.load_adapter(qwen2, copy)
    shutil.rmtree(copy)
    dl.save_adapter(model, copy)
    file = copy / "droplora_config.json"
    own = json.loads(file.read_text())
    for field, (value, message) in {
        "kind": ("tree", r"kind='tree' is not known; known: droplora, dora"),
        "rank": ("four", r"droplora_config\.json: rank: "),
        "drop_rate": (1.5, r"drop_rate=1\.5"),
    }.items():
        file.write_text(json.dumps(own | {field: value}))
        with pytest.raises(dl.InputError, match=message):
            dl.load_adapter(qwen2, copy)
