"""Adapters that PEFT trained, with each of its options: the same function here, and back again."""

from __future__ import annotations

import json
import shutil
from dataclasses import replace
from pathlib import Path
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import peft
import pytest
import torch
from flax import nnx
from gradients import loss_and_gradients
from oracles import Folder, model_folder, random_tokens, relative, torch_logits
from safetensors.numpy import load_file, save_file
from small_models import load
from transformers import AutoModelForCausalLM

import droplora_jax as dl
from droplora_jax.adapters.fully_trained import wholes_of
from droplora_jax.adapters.surgery import adapters_of
from droplora_jax.hf.peft.adapter import adapter_config, adapter_tensors
from droplora_jax.hf.peft.config import vllm_limits

pytestmark = pytest.mark.usefixtures("strict")

TOKENS = random_tokens(2, 24)
ATTENTION = ["q_proj", "v_proj"]
LINEAR = ["q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj"]
FAMILIES = {
    "llama": {"attention_bias": True, "mlp_bias": True},
    "mistral": {"sliding_window": 7},
    "qwen2": {},
    "qwen3": {"head_dim": 16},
}
OPTIONS = {
    "plain": {"target_modules": LINEAR},
    "rsLoRA": {"use_rslora": True, "lora_alpha": 3},
    "suffixes": {"target_modules": ["self_attn.q_proj", "down_proj"]},
    "full names": {"target_modules": ["model.layers.1.mlp.up_proj", "k_proj"]},
    "regular expression": {
        "target_modules": r".*\.(0|2)\.self_attn\.[qk]_proj|.*\.1\.mlp\.(up|down)_proj"
    },
    "exclude_modules": {"target_modules": LINEAR, "exclude_modules": ["mlp.up_proj", "v_proj"]},
    "exclude_modules, regular expression": {"exclude_modules": r".*layers\.1\..*"},
    "layers_to_transform": {"layers_to_transform": [0, 2]},
    "layers_to_transform, layers_pattern": {"layers_to_transform": 1, "layers_pattern": "layers"},
    "rank_pattern": {"rank_pattern": {"q_proj": 1, r"layers\.1\.self_attn\.v_proj": 6}},
    "alpha_pattern": {"alpha_pattern": {r".*\.2\..*_proj": 9, "q_proj": 0.5}},
    "patterns, rsLoRA, layers": {
        "rank_pattern": {"v_proj": 5},
        "alpha_pattern": {"model.layers.0.self_attn.v_proj": 2},
        "use_rslora": True,
        "layers_to_transform": [0, 1],
    },
    "modules_to_save": {"modules_to_save": ["lm_head", "norm"]},
    "modules_to_save, embedding": {"modules_to_save": ["embed_tokens", "up_proj"]},
    "bias all": {"bias": "all"},
    "bias lora_only": {"bias": "lora_only"},
    "DoRA": {"use_dora": True, "target_modules": LINEAR},
    "DoRA, layers and patterns": {
        "use_dora": True,
        "layers_to_transform": [1, 2],
        "rank_pattern": {"q_proj": 2},
    },
    "DoRA, bias, modules_to_save": {
        "use_dora": True,
        "bias": "all",
        "modules_to_save": ["lm_head"],
        "use_rslora": True,
    },
    "initialisation": {"init_lora_weights": "gaussian", "lora_dropout": 0.1},
}
# All options on one family, which has biases; a few of them on the others.
CASES = [("qwen2", option) for option in OPTIONS] + [
    (family, option)
    for family in FAMILIES
    if family != "qwen2"
    for option in ("plain", "DoRA, layers and patterns", "modules_to_save", "bias all")
]


class Trained(NamedTuple):
    """A base, and an adapter that PEFT trained on it."""

    base: Path
    adapter: Path
    logits: np.ndarray


@pytest.fixture(scope="module")
def bases(tmp_path_factory) -> dict[str, Folder]:
    return {
        family: model_folder(tmp_path_factory.mktemp(family), family, **options)
        for family, options in FAMILIES.items()
    }


def train_in_peft(base: Path, folder: Path, **options) -> Trained:
    """Two steps of AdamW: every trained tensor moves."""
    with torch.random.fork_rng():
        torch.manual_seed(1)
        config = {"r": 3, "lora_alpha": 5, "target_modules": ATTENTION, **options}
        theirs = peft.get_peft_model(
            AutoModelForCausalLM.from_pretrained(base, dtype=torch.float32),
            peft.LoraConfig(task_type="CAUSAL_LM", **config),
        )
        optimizer = torch.optim.AdamW(theirs.parameters(), lr=0.05)
        batch = torch.tensor(TOKENS, dtype=torch.long)
        for _ in range(2):
            theirs(batch, labels=batch).loss.backward()
            optimizer.step()
            optimizer.zero_grad()
    theirs.save_pretrained(folder)
    return Trained(base, folder, torch_logits(theirs.eval(), TOKENS))


@pytest.fixture(params=CASES, ids=", ".join)
def trained(request, bases, tmp_path) -> Trained:
    family, option = request.param
    return train_in_peft(bases[family].path, tmp_path / "theirs", **OPTIONS[option])


@nnx.jit
def forward(model, tokens):
    return model(tokens)


def in_peft(base: Path, adapter: Path) -> peft.PeftModel:
    model = AutoModelForCausalLM.from_pretrained(base, dtype=torch.float32)
    return peft.PeftModel.from_pretrained(model, adapter).eval()


def test_the_same_function_here_and_back(trained, tmp_path):
    plain = load(trained.base)
    model = dl.load_adapter(plain, trained.adapter)
    logits = forward(model, TOKENS)
    assert relative(logits, trained.logits) < 1e-5
    assert relative(forward(plain, TOKENS), trained.logits) > 1e-2

    # In memory and on the disk: one function, with the adapter or without one.
    assert relative(forward(dl.merge(model), TOKENS), logits) < 1e-5
    dl.save_merged(model, tmp_path / "merged")
    theirs = AutoModelForCausalLM.from_pretrained(tmp_path / "merged", dtype=torch.float32)
    assert relative(torch_logits(theirs, TOKENS), trained.logits) < 1e-5

    # Out again: the same bits under the same names, for PEFT and for us.
    dl.save_adapter(model, tmp_path / "ours")
    before, after = (
        load_file(folder / "adapter_model.safetensors")
        for folder in (trained.adapter, tmp_path / "ours")
    )
    assert before.keys() == after.keys()
    for name, value in before.items():
        np.testing.assert_array_equal(value, after[name], err_msg=name)
    assert relative(torch_logits(in_peft(trained.base, tmp_path / "ours"), TOKENS), logits) < 1e-5
    back = dl.load_adapter(plain, tmp_path / "ours")
    np.testing.assert_array_equal(forward(back, TOKENS), logits)
    assert adapter_config(plain.config, tmp_path / "ours") == _config(model)


def _config(model: nnx.Module) -> dl.DropLoRA:
    return next(iter(adapters_of(model).values())).config


@pytest.mark.parametrize(
    "option", ["rank_pattern", "DoRA, layers and patterns", "DoRA, bias, modules_to_save"]
)
def test_training_goes_on(option, bases, tmp_path):
    """Its gradients are PEFT's, on one device and on eight; and ranks are dropped if asked for."""
    trained = train_in_peft(bases["qwen2"].path, tmp_path / "theirs", **OPTIONS[option])
    theirs = in_peft(trained.base, trained.adapter).train()
    for name, parameter in theirs.named_parameters():
        trains = ("lora_" in name or "modules_to_save" in name) or (
            name.endswith("bias") and "bias" in option
        )
        parameter.requires_grad_(trains)
    batch = torch.tensor(TOKENS, dtype=torch.long)
    theirs(batch, labels=batch).loss.backward()
    expected = {
        name.replace(".default", "").replace(".modules_to_save", ""): p.grad.numpy()
        for name, p in theirs.named_parameters()
        if p.grad is not None
    }
    for devices in (1, 8):
        model = dl.load_adapter(load(trained.base, devices=devices), trained.adapter)
        _, gradients = loss_and_gradients(model, TOKENS)
        ours = _by_key(model, gradients)
        assert len(ours) == len(expected)
        for name, value in ours.items():
            there = expected.get(name, expected.get(f"{name}.weight"))
            assert relative(value, there) < 1e-4, name

    config = replace(adapter_config(model.config, trained.adapter), drop_rate=0.5)
    dropping = dl.load_adapter(load(trained.base), trained.adapter, config=config)
    rows = jnp.arange(2)
    first, second = (
        forward(dl.masked(dropping, dl.root_key(seed), rows=rows), TOKENS) for seed in (0, 1)
    )
    assert relative(first, second) > 1e-3
    plain = dl.load_adapter(load(trained.base), trained.adapter)
    np.testing.assert_array_equal(forward(dropping, TOKENS), forward(plain, TOKENS))


def _by_key(model: nnx.Module, gradients: dict) -> dict[str, np.ndarray]:
    """Gradients by PEFT's keys: what is exported of a model that holds them as its values."""
    graphdef, adapters, rest = nnx.split(model, nnx.LoRAParam, ...)
    as_values = nnx.map_state(lambda path, p: p.replace(jnp.asarray(gradients[path])), adapters)
    by_key = adapter_tensors(nnx.merge(graphdef, as_values, rest))
    # Padding and layers without an adapter have none (a magnitude that is not used has 0 too).
    sizes = [sum(float(np.sum(np.square(g))) for g in of.values()) for of in (gradients, by_key)]
    np.testing.assert_allclose(sizes[0], sizes[1], rtol=1e-5)
    return by_key


def test_what_is_trained_whole_moves_and_is_cast_where_it_is_used(bases, tmp_path):
    """In float32 beside a bfloat16 base; the base that was loaded stays as it was."""
    trained = train_in_peft(
        bases["qwen2"].path,
        tmp_path / "theirs",
        bias="all",
        modules_to_save=["lm_head", "norm", "embed_tokens"],
    )
    base = load(trained.base, dtype=jnp.bfloat16)
    model = dl.load_adapter(base, trained.adapter)
    wholes = wholes_of(model)
    assert len(wholes) == 5 + 3  # norms, embedding and head; three biases
    assert {str(whole[...].dtype) for whole in wholes.values()} == {"float32"}
    assert forward(model, TOKENS).dtype == jnp.bfloat16
    assert relative(forward(model, TOKENS), trained.logits) < 3e-2
    assert not wholes_of(base)
    merged = dl.merge(model)
    assert not wholes_of(merged)
    assert jax.tree.map(jnp.dtype, nnx.state(merged)) == jax.tree.map(jnp.dtype, nnx.state(base))
    assert nnx.graphdef(merged) == nnx.graphdef(base)


def test_dora_beside_a_bfloat16_base(bases, tmp_path):
    options = {"use_dora": True, "target_modules": LINEAR}
    trained = train_in_peft(bases["qwen2"].path, tmp_path / "theirs", **options)
    model = dl.load_adapter(load(trained.base, dtype=jnp.bfloat16), trained.adapter)
    logits = forward(model, TOKENS)
    assert logits.dtype == jnp.bfloat16
    assert relative(logits, trained.logits) < 3e-2
    assert relative(forward(dl.merge(model), TOKENS), logits) < 3e-2


TIED = {
    "apart": ({"modules_to_save": ["embed_tokens"]}, r"modules_to_save.*ensure_weight_tying"),
    "head": ({"modules_to_save": ["lm_head"]}, r"modules_to_save.*lm_head.*ties them"),
}


@pytest.mark.parametrize("case", TIED)
def test_a_tied_head_that_was_trained_apart_is_refused(case, tied, tmp_path):
    options, message = TIED[case]
    trained = train_in_peft(tied.path, tmp_path / "theirs", **options)
    with pytest.raises(dl.InputError, match=message):
        dl.load_adapter(load(tied.path), trained.adapter)


def test_an_embedding_that_is_tied_in_the_adapter_too(tied, tmp_path):
    options = {"modules_to_save": ["embed_tokens"], "ensure_weight_tying": True}
    trained = train_in_peft(tied.path, tmp_path / "theirs", **options)
    model = dl.load_adapter(load(tied.path), trained.adapter)
    assert relative(forward(model, TOKENS), trained.logits) < 1e-5
    dl.save_adapter(model, tmp_path / "ours")
    theirs = in_peft(tied.path, tmp_path / "ours")
    assert relative(torch_logits(theirs, TOKENS), trained.logits) < 1e-5


# What can't be represented, or is broken.


@pytest.fixture(scope="module")
def ordinary(bases, tmp_path_factory) -> Trained:
    return train_in_peft(bases["qwen2"].path, tmp_path_factory.mktemp("ordinary"), bias="all")


@pytest.fixture
def copy(ordinary, tmp_path) -> Path:
    return Path(shutil.copytree(ordinary.adapter, tmp_path / "copy"))


def edit(folder: Path, tensors: dict, **fields) -> None:
    file, config = folder / "adapter_model.safetensors", folder / "adapter_config.json"
    kept = load_file(file) | tensors
    save_file({name: value for name, value in kept.items() if value is not None}, file)
    config.write_text(json.dumps(json.loads(config.read_text()) | fields))


KEY = "base_model.model.model.layers.1.self_attn.q_proj"
BROKEN = {
    "unknown peft_type": ({}, {"peft_type": "VERA"}, r"peft_type='VERA'.*'LORA'"),
    "another base": (
        {f"{KEY}.lora_A.weight": np.zeros((3, 40), np.float32)},
        {},
        r"lora_A\.weight has shape \[3, 40\], the model needs \[3, 32\].*another base",
    ),
    "more layers": (
        {KEY.replace("1", "7") + ".lora_A.weight": np.zeros((3, 32), np.float32)},
        {},
        r"layers\.7.*another base",
    ),
    "a factor missing": ({f"{KEY}.lora_B.weight": None}, {}, r"lacks .*lora_B\.weight"),
    "a bias missing": (
        {"base_model.model.model.layers.2.self_attn.k_proj.bias": None},
        {},
        r"k_proj\.bias is trained in 2 of 3 layers.*bias",
    ),
    "rank": ({}, {"r": 4}, r"lora_A\.weight has shape \[3, 32\], the model needs \[4, 32\]"),
    "not a target": ({}, {"target_modules": ["v_proj"]}, r"does not name .*q_proj.*target_modules"),
    "NaN": (
        {f"{KEY}.lora_A.weight": np.full((3, 32), np.nan, np.float32)},
        {},
        r"layers\.1\.self_attn\.q_proj\.lora_A\.weight holds NaN or infinity",
    ),
    "embedding": (
        {"base_model.model.model.embed_tokens.lora_embedding_A": np.zeros((3, 8), np.float32)},
        {},
        r"lora_embedding_A is there.*does not name model\.embed_tokens in target_modules",
    ),
    "bias of B": (
        {f"{KEY}.lora_B.bias": np.zeros(32, np.float32)},
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
def test_broken_adapters_are_named(case, ordinary, copy):
    tensors, fields, message = BROKEN[case]
    edit(copy, tensors, **fields)
    with pytest.raises(dl.InputError, match=message):
        dl.load_adapter(load(ordinary.base), copy)


def test_own_options_that_are_broken(ordinary, copy):
    model = dl.load_adapter(load(ordinary.base), copy)
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
            dl.load_adapter(load(ordinary.base), copy)


@pytest.mark.parametrize(
    ("options", "reasons"),
    [
        ({}, []),
        ({"rank_stabilized": True}, []),
        ({"rank_pattern": {"q_proj": 2}}, ["rank_pattern"]),
        ({"alpha_pattern": {r"layers\.0\.q_proj": 2.0}}, ["alpha_pattern"]),
        ({"train_whole": ("lm_head",)}, ["modules_to_save"]),
        ({"train_whole": ("bias$",)}, ["bias"]),
    ],
    ids=str,
)
def test_what_vllm_does_not_serve_is_said(options, reasons, bases, tmp_path):
    """vLLM knows A and B of linear layers, with one rank and one alpha."""
    config = dl.DropLoRA(rank=4, **options)
    model = dl.inject(load(bases["qwen2"].path), config, key=dl.root_key(0))
    said = dl.save_adapter(model, tmp_path / "out")
    assert len(said) == len(reasons)
    assert all(reason in words for reason, words in zip(reasons, said, strict=True))
    if not reasons:
        names = load_file(tmp_path / "out" / "adapter_model.safetensors")
        assert all(name.endswith((".lora_A.weight", ".lora_B.weight")) for name in names)
        written = json.loads((tmp_path / "out" / "adapter_config.json").read_text())
        assert vllm_limits(written) == []
        assert written["bias"] == "none"
        assert not written["modules_to_save"]


def test_biases_that_peft_has_no_word_for(bases, tmp_path):
    config = dl.DropLoRA(rank=2, train_whole=(r"layers\.k_proj\.bias",))
    model = dl.inject(load(bases["qwen2"].path), config, key=dl.root_key(0))
    with pytest.raises(dl.InputError, match=r"train_whole.*layers\.k_proj\.bias"):
        dl.save_adapter(model, tmp_path / "out")
    assert list(tmp_path.iterdir()) == []
