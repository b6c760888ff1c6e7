"""Adapters that bring ends of their own: another vocabulary, copies of the base's tables."""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import peft
import pytest
import torch
from flax import nnx
from oracles import TINY, Folder, relative, torch_logits
from peft_models import ATTENTION
from safetensors.numpy import load_file, save_file
from small_models import load
from transformers import AutoModelForCausalLM

import droplora_jax as dl
from droplora_jax.adapters.fully_trained import wholes_of
from droplora_jax.hf.base import Base
from droplora_jax.hf.peft.adapter import adapter_config

MORE, FEWER = TINY["vocab_size"] + 2, TINY["vocab_size"] - 8
BOTH = ["embed_tokens", "lm_head"]


@nnx.jit
def forward(model, tokens):
    return model(tokens)


class Resized(NamedTuple):
    """An adapter on a base whose vocabulary was resized before training."""

    base: Path
    adapter: Path
    tokens: np.ndarray
    logits: np.ndarray


def resized_base(base: Path, rows: int) -> Any:
    model = AutoModelForCausalLM.from_pretrained(base, dtype=torch.float32)
    model.resize_token_embeddings(rows, mean_resizing=False)
    return model


def train_resized(
    base: Path, folder: Path, rows: int = MORE, *, copies: bool | str = "auto", **options: Any
) -> Resized:
    """What PEFT trains is moved off where it starts; logits are those of tokens of all rows."""
    with torch.random.fork_rng():
        torch.manual_seed(1)
        config = {"r": 3, "lora_alpha": 5, "target_modules": ATTENTION, **options}
        model = peft.get_peft_model(
            resized_base(base, rows), peft.LoraConfig(task_type="CAUSAL_LM", **config)
        )
        for parameter in model.parameters():
            if parameter.requires_grad:
                parameter.data.add_(0.05 * torch.randn_like(parameter))
    model.save_pretrained(folder, save_embedding_layers=copies)
    tokens = np.random.default_rng(0).integers(1, rows, (2, 24), dtype=np.int32)
    tokens[0, :4] = rows - 1
    return Resized(base, folder, tokens, torch_logits(model.eval(), tokens))


CASES: dict[str, tuple[str, int, dict[str, Any]]] = {
    "trained": ("untied", MORE, {"modules_to_save": BOTH}),
    "with factors": ("untied", MORE, {"target_modules": [*ATTENTION, *BOTH]}),
    "frozen": ("untied", MORE, {}),
    "fewer tokens": ("untied", FEWER, {"modules_to_save": BOTH}),
    "tied, trained": (
        "tied",
        MORE,
        {"modules_to_save": ["embed_tokens"], "ensure_weight_tying": True},
    ),
    "tied, frozen": ("tied", MORE, {}),
    "tied, fewer tokens": ("tied", FEWER, {}),
    "tied, both trained apart": ("tied", MORE, {"modules_to_save": BOTH}),
    "tied, trained apart": ("tied", MORE, {"modules_to_save": ["lm_head"]}),
}


@pytest.mark.parametrize("case", CASES)
def test_an_adapter_of_a_resized_vocabulary(case, request, tmp_path):
    name, rows, options = CASES[case]
    base: Folder = request.getfixturevalue(name)
    trained = train_resized(base.path, tmp_path / "theirs", rows, **options)
    model = dl.load_adapter(load(base.path), trained.adapter)
    assert model.config.vocab_size == rows
    assert relative(forward(model, trained.tokens), trained.logits) < 1e-5
    report = dl.save_merged(model, tmp_path / "merged")
    assert f"{rows} rows" in str(report)
    theirs = AutoModelForCausalLM.from_pretrained(tmp_path / "merged", dtype=torch.float32)
    assert relative(torch_logits(theirs, trained.tokens), trained.logits) < 1e-5
    dl.save_adapter(model, tmp_path / "ours")
    theirs = peft.PeftModel.from_pretrained(resized_base(base.path, rows), tmp_path / "ours")
    assert relative(torch_logits(theirs.eval(), trained.tokens), trained.logits) < 1e-5
    # In as shapes only, as a plan and an export have it: the same shapes, and the same options.
    under = Base.open(base.path).under([trained.adapter])
    assert under.shape == model.config
    ours, theirs = (adapter_config(under.shape, tmp_path / name) for name in ("ours", "theirs"))
    assert ours == theirs


@pytest.mark.parametrize("trained", [True, False])
def test_a_copy_of_a_tied_embedding_in_the_base_s_file_is_resized_too(trained, tied, tmp_path):
    base = Path(shutil.copytree(tied.path, tmp_path / "base"))
    index = json.loads((base / "model.safetensors.index.json").read_text())
    name = index["weight_map"]["model.embed_tokens.weight"]
    stored = load_file(base / name)
    stored["lm_head.weight"] = stored["model.embed_tokens.weight"].copy()
    save_file(stored, base / name, metadata={"format": "pt"})
    index["weight_map"]["lm_head.weight"] = name
    (base / "model.safetensors.index.json").write_text(json.dumps(index))
    ends = {"modules_to_save": ["embed_tokens"], "ensure_weight_tying": True} if trained else {}
    adapter = train_resized(base, tmp_path / "theirs", **ends)
    model = dl.load_adapter(load(base), adapter.adapter)
    dl.save_merged(model, tmp_path / "merged")
    theirs = AutoModelForCausalLM.from_pretrained(tmp_path / "merged", dtype=torch.float32)
    assert relative(torch_logits(theirs, adapter.tokens), adapter.logits) < 1e-5


def test_copies_of_the_base_are_passed_over_and_stay_frozen(untied, tmp_path):
    """PEFT stores a trained head three times, and an embedding that it did not train."""
    rows = TINY["vocab_size"]
    trained = train_resized(
        untied.path, tmp_path / "theirs", rows, copies=True, modules_to_save=["lm_head"]
    )
    stored = load_file(trained.adapter / "adapter_model.safetensors")
    assert {key.split("model.")[-1] for key in stored if "lora" not in key} == {
        "embed_tokens.weight",
        "lm_head.weight",
        "lm_head.modules_to_save.weight",
        "lm_head.original_module.weight",
    }
    base = load(untied)
    model = dl.load_adapter(base, trained.adapter)
    assert relative(forward(model, trained.tokens), trained.logits) < 1e-5
    assert list(wholes_of(model)) == [("lm_head", "kernel")]
    assert model.source == base.source


def edit(folder: Path, **changes) -> None:
    """Give tensors other names; None takes one out."""
    file = folder / "adapter_model.safetensors"
    tensors = load_file(file)
    for name in list(tensors):
        for old, new in changes.items():
            if old in name:
                value = tensors.pop(name)
                if new is not None:
                    tensors[name.replace(old, new)] = value
    save_file(tensors, file)


def test_a_trained_module_under_the_name_that_older_versions_gave_it(untied, tmp_path):
    trained = train_resized(untied.path, tmp_path / "theirs", modules_to_save=BOTH)
    edit(trained.adapter, **{"embed_tokens": "embed_tokens.modules_to_save"})
    model = dl.load_adapter(load(untied), trained.adapter)
    assert relative(forward(model, trained.tokens), trained.logits) < 1e-5


def test_factors_of_more_tokens_without_their_tables_are_refused(untied, tmp_path):
    options = {"target_modules": [*ATTENTION, *BOTH]}
    trained = train_resized(untied.path, tmp_path / "theirs", copies=False, **options)
    with pytest.raises(dl.InputError, match=rf"is for {MORE} tokens.*save_embedding_layers=True"):
        dl.load_adapter(load(untied), trained.adapter)


def test_one_end_of_another_vocabulary_than_the_other_is_refused(untied, tmp_path):
    trained = train_resized(untied.path, tmp_path / "theirs")
    edit(trained.adapter, **{"lm_head.weight": None})
    with pytest.raises(dl.InputError, match=r"lm_head\.weight of as many rows is not stored"):
        dl.load_adapter(load(untied), trained.adapter)


def test_copies_that_are_not_the_base_s_count_as_the_base(untied, tmp_path):
    """As PEFT has it: rows of tokens that were in the table before, given other values."""
    rows = TINY["vocab_size"]
    trained = train_resized(untied.path, tmp_path / "theirs", rows, copies=True)
    file = trained.adapter / "adapter_model.safetensors"
    stored = load_file(file)
    table = stored["base_model.model.model.embed_tokens.weight"]
    table[-3:] = table[:3]
    save_file(stored, file)
    theirs = peft.PeftModel.from_pretrained(resized_base(untied.path, rows), trained.adapter)
    model = dl.load_adapter(load(untied), trained.adapter)
    expected = torch_logits(theirs.eval(), trained.tokens)
    assert relative(expected, trained.logits) > 1e-3
    assert relative(forward(model, trained.tokens), expected) < 1e-5
    assert not wholes_of(model)
