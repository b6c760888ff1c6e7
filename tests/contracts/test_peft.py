"""Adapters that PEFT trained, with each of its options: the same function here, and back again."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import torch
from flax import nnx
from gradients import loss_and_gradients
from oracles import Folder, model_folder, relative, torch_logits
from peft_models import ATTENTION, TOKENS, in_peft, train_in_peft
from safetensors.numpy import load_file
from small_models import load
from transformers import AutoModelForCausalLM

import droplora_jax as dl
from droplora_jax.adapters.fully_trained import wholes_of
from droplora_jax.adapters.surgery import adapters_of
from droplora_jax.hf.peft.adapter import adapter_config, adapter_tensors
from droplora_jax.models.families import FAMILIES as LLAMA_LIKE

pytestmark = pytest.mark.usefixtures("strict")

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
# One case for each difference in the forward pass; for all others the merged tensors are compared.
FUNCTIONS = [
    ("qwen2", "plain"),
    ("qwen2", "patterns, rsLoRA, layers"),
    ("qwen2", "modules_to_save, embedding"),
    ("qwen2", "DoRA, bias, modules_to_save"),
    ("llama", "bias all"),
    ("mistral", "DoRA, layers and patterns"),
    ("qwen3", "modules_to_save"),
]
OTHERS = [("qwen2", option) for option in OPTIONS if ("qwen2", option) not in FUNCTIONS] + [
    case
    for option in ("plain", "DoRA, layers and patterns", "modules_to_save", "bias all")
    for family in FAMILIES
    if (case := (family, option)) not in FUNCTIONS and family != "qwen2"
]


@pytest.fixture(scope="module")
def bases(tmp_path_factory) -> dict[str, Folder]:
    return {
        family: model_folder(tmp_path_factory.mktemp(family), family, **options)
        for family, options in FAMILIES.items()
    }


@pytest.fixture(scope="module")
def plain(bases) -> dict[str, nnx.Module]:
    """The models of the bases. No test changes them."""
    return {family: load(folder) for family, folder in bases.items()}


@nnx.jit
def forward(model, tokens):
    return model(tokens)


@jax.jit
def masked_forward(model, key, tokens):
    return dl.masked(model, key, rows=jnp.arange(tokens.shape[0]))(tokens)


def tensors_of(model: nnx.Module) -> dict[str, np.ndarray]:
    """The parameters by their names in files."""
    names = LLAMA_LIKE[model.config.family].tensor_names(model.config)
    tensors = {}
    for path, parameter in nnx.to_flat_state(nnx.state(model)):
        name, value = names[".".join(path)], np.asarray(parameter[...])
        for layer, part in enumerate(value if name.stacked else value[None]):
            tensors[name.of_layer(layer)] = part.T if name.transposed else part
    return tensors


def assert_same_files(before: Path, after: Path) -> None:
    """The same bits under the same names."""
    before, after = (load_file(f / "adapter_model.safetensors") for f in (before, after))
    assert before.keys() == after.keys()
    for name, value in before.items():
        np.testing.assert_array_equal(value, after[name], err_msg=name)


@pytest.mark.parametrize(("family", "option"), FUNCTIONS)
def test_the_same_function_here_and_back(family, option, bases, plain, tmp_path):
    trained = train_in_peft(bases[family].path, tmp_path / "theirs", **OPTIONS[option])
    base = plain[family]
    model = dl.load_adapter(base, trained.adapter)
    logits = forward(model, TOKENS)
    assert relative(logits, trained.logits) < 1e-5
    assert relative(forward(base, TOKENS), trained.logits) > 1e-2

    # In memory and on the disk: one function, with the adapter or without one.
    assert relative(forward(dl.merge(model), TOKENS), logits) < 1e-5
    dl.save_merged(model, tmp_path / "merged")
    theirs = AutoModelForCausalLM.from_pretrained(tmp_path / "merged", dtype=torch.float32)
    assert relative(torch_logits(theirs, TOKENS), trained.logits) < 1e-5

    # Out again, for PEFT and for us.
    dl.save_adapter(model, tmp_path / "ours")
    assert_same_files(trained.adapter, tmp_path / "ours")
    assert relative(torch_logits(in_peft(trained.base, tmp_path / "ours"), TOKENS), logits) < 1e-5
    back = dl.load_adapter(base, tmp_path / "ours")
    np.testing.assert_array_equal(forward(back, TOKENS), logits)
    assert adapter_config(base.config, tmp_path / "ours") == _config(model)


@pytest.mark.parametrize(("family", "option"), OTHERS)
def test_the_same_merge_here_and_back(family, option, bases, plain, tmp_path):
    trained = train_in_peft(bases[family].path, tmp_path / "theirs", **OPTIONS[option])
    model = dl.load_adapter(plain[family], trained.adapter)
    ours, before = tensors_of(dl.merge(model)), tensors_of(plain[family])
    theirs = in_peft(trained.base, trained.adapter).merge_and_unload().state_dict()
    assert ours.keys() == theirs.keys()
    for name, value in theirs.items():
        assert relative(ours[name], value.numpy()) < 1e-6, name
    assert any(relative(ours[name], before[name]) > 1e-2 for name in ours)
    dl.save_adapter(model, tmp_path / "ours")
    assert_same_files(trained.adapter, tmp_path / "ours")
    assert adapter_config(model.config, tmp_path / "ours") == _config(model)


def _config(model: nnx.Module) -> dl.DropLoRA:
    return next(iter(adapters_of(model).values())).config


@pytest.mark.parametrize(
    ("option", "devices"),
    [("rank_pattern", 8), ("DoRA, layers and patterns", 1), ("DoRA, bias, modules_to_save", 8)],
)
def test_training_goes_on(option, devices, bases, plain, tmp_path):
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
    base = plain["qwen2"] if devices == 1 else load(trained.base, devices=devices)
    model = dl.load_adapter(base, trained.adapter)
    _, gradients = loss_and_gradients(model, TOKENS)
    ours = _by_key(model, gradients)
    assert len(ours) == len(expected)
    for name, value in ours.items():
        their_gradient = expected.get(name, expected.get(f"{name}.weight"))
        assert relative(value, their_gradient) < 1e-4, name

    config = replace(adapter_config(model.config, trained.adapter), drop_rate=0.5)
    dropping = dl.load_adapter(plain["qwen2"], trained.adapter, config=config)
    first, second = (masked_forward(dropping, dl.root_key(seed), TOKENS) for seed in (0, 1))
    assert relative(first, second) > 1e-3
    undropped = dl.load_adapter(plain["qwen2"], trained.adapter)
    np.testing.assert_array_equal(forward(dropping, TOKENS), forward(undropped, TOKENS))


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
    logits = forward(model, TOKENS)
    assert logits.dtype == jnp.bfloat16
    assert relative(logits, trained.logits) < 3e-2
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


# Ends of a tied base that are two in the adapter: trained each by itself, or one of them alone.
APART = {
    "embedding": {"modules_to_save": ["embed_tokens"]},
    "head": {"modules_to_save": ["lm_head"]},
    "both": {"modules_to_save": ["embed_tokens", "lm_head"]},
    "factors of the head": {"target_modules": [*ATTENTION, "lm_head"]},
    "factors of the embedding": {"target_modules": [*ATTENTION, "embed_tokens"]},
    "factors of both": {"target_modules": [*ATTENTION, "embed_tokens", "lm_head"]},
    "DoRA": {
        "target_modules": [*ATTENTION, "embed_tokens"],
        "use_dora": True,
        "ensure_weight_tying": True,
    },
}


@pytest.mark.parametrize("case", APART)
def test_ends_of_a_tied_base_that_were_trained_apart_become_an_untied_model(case, tied, tmp_path):
    trained = train_in_peft(tied.path, tmp_path / "theirs", **APART[case])
    model = dl.load_adapter(load(tied.path), trained.adapter)
    assert not model.config.tie_embeddings
    assert relative(forward(model, TOKENS), trained.logits) < 1e-5
    report = dl.save_merged(model, tmp_path / "merged")
    assert "untied" in str(report)
    theirs = AutoModelForCausalLM.from_pretrained(tmp_path / "merged", dtype=torch.float32)
    assert relative(torch_logits(theirs, TOKENS), trained.logits) < 1e-5
    dl.save_adapter(model, tmp_path / "ours")
    theirs = in_peft(tied.path, tmp_path / "ours")
    assert relative(torch_logits(theirs, TOKENS), trained.logits) < 1e-5


def test_an_embedding_that_is_tied_in_the_adapter_too(tied, tmp_path):
    options = {"modules_to_save": ["embed_tokens"], "ensure_weight_tying": True}
    trained = train_in_peft(tied.path, tmp_path / "theirs", **options)
    model = dl.load_adapter(load(tied.path), trained.adapter)
    assert relative(forward(model, TOKENS), trained.logits) < 1e-5
    dl.save_adapter(model, tmp_path / "ours")
    theirs = in_peft(tied.path, tmp_path / "ours")
    assert relative(torch_logits(theirs, TOKENS), trained.logits) < 1e-5
