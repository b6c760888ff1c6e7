"""What other tools make of an adapter's folder: tried with them, or, for vLLM, by its rules."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch
from oracles import Folder, model_folder, relative, torch_logits
from peft_models import ATTENTION, TOKENS, in_peft, train_in_peft
from safetensors import safe_open
from small_models import load
from transformers import AutoModelForCausalLM

import droplora_jax as dl
from droplora_jax.commands.export_model import source_notes
from droplora_jax.hf.peft.adapter import export
from droplora_jax.hf.peft.consumers import vllm_options

LINEAR = {"q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj"}
ENDS = {"embed_tokens", "lm_head"}


def by_transformers(folder: Path):
    model = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32).eval()
    return torch_logits(model, TOKENS)


def exported(base: Folder, adapter: Path, folder: Path) -> str:
    return export(dl.load_adapter(load(base), adapter), folder)


def test_transformers_loses_the_magnitudes_of_dora(untied, tmp_path):
    trained = train_in_peft(untied.path, tmp_path / "theirs", use_dora=True)
    said = exported(untied, trained.adapter, tmp_path / "ours")
    assert "loads a DoRA adapter without its magnitudes" in said
    assert relative(by_transformers(tmp_path / "ours"), trained.logits) > 1e-2
    right = torch_logits(in_peft(untied.path, tmp_path / "ours"), TOKENS)
    assert relative(right, trained.logits) < 1e-5


@pytest.mark.parametrize("tying", [True, False])
def test_peft_merges_an_adapter_of_a_tied_end_wrongly(tying, tied, tmp_path):
    options = {"target_modules": [*ATTENTION, "embed_tokens"], "ensure_weight_tying": tying}
    trained = train_in_peft(tied.path, tmp_path / "theirs", **options)
    said = exported(tied, trained.adapter, tmp_path / "ours")
    assert "merge_and_unload" in said
    model = in_peft(tied.path, tmp_path / "ours")
    assert relative(torch_logits(model, TOKENS), trained.logits) < 1e-5
    assert relative(torch_logits(model.merge_and_unload(), TOKENS), trained.logits) > 1e-2


def test_transformers_puts_an_adapter_onto_the_model_beside_it(untied, tmp_path):
    trained = train_in_peft(untied.path, tmp_path / "both")
    in_peft(untied.path, trained.adapter).merge_and_unload().save_pretrained(tmp_path / "both")
    assert relative(by_transformers(tmp_path / "both"), trained.logits) > 1e-2
    assert "counts twice" in " ".join(source_notes([str(tmp_path / "both")]))
    dl.save_merged(dl.load_adapter(load(untied), tmp_path / "both"), tmp_path / "merged")
    assert relative(by_transformers(tmp_path / "merged"), trained.logits) < 1e-5


def test_an_adapter_in_the_folder_of_a_base_does_not_travel(untied, tmp_path):
    """transformers would look for its weights in the merged folder, and find none."""
    trained = train_in_peft(untied.path, tmp_path / "theirs")
    base = tmp_path / "base"
    untied.torch.save_pretrained(base)
    (base / "adapter_config.json").write_bytes(
        (trained.adapter / "adapter_config.json").read_bytes()
    )
    dl.save_merged(dl.load_adapter(load(base), trained.adapter), tmp_path / "merged")
    assert not (tmp_path / "merged" / "adapter_config.json").exists()
    assert relative(by_transformers(tmp_path / "merged"), trained.logits) < 1e-5


# vLLM 0.33.0, as its source has it: what an adapter's configuration may say, and which tensors it
# takes. A module is named by the last part of its path.


def vllm_takes(folder: Path, family: str) -> bool:
    config = json.loads((folder / "adapter_config.json").read_text())
    if any(config.get(key) for key in ("modules_to_save", "use_dora", "lora_bias")):
        return False
    if config.get("bias", "none") != "none" or isinstance(config["init_lora_weights"], str):
        return False
    modules = LINEAR | (ENDS if family in ("llama", "qwen3") else set())
    with safe_open(folder / "adapter_model.safetensors", "numpy") as file:
        return all(_takes(key.split("."), modules) for key in file.keys())  # noqa: SIM118


def _takes(parts: list[str], modules: set[str]) -> bool:
    if "base_layer" in parts:
        return True  # it is passed over
    if parts[-1].startswith("lora_embedding_"):
        return parts[-2] in modules
    return parts[-1] == "weight" and parts[-2] in ("lora_A", "lora_B") and parts[-3] in modules


@pytest.fixture(scope="module", params=["llama", "mistral", "qwen2", "qwen3"])
def family(request, tmp_path_factory) -> Folder:
    return model_folder(tmp_path_factory.mktemp(request.param), request.param)


OPTIONS = [
    {},
    {"targets": "all-linear", "rank_stabilized": True},
    {"rank_pattern": {"q_proj": 2}},
    {"targets": ("q_proj", "embed", "lm_head")},
    {"train_whole": ("lm_head",)},
    {"train_whole": ("norm",)},
]


def test_what_is_said_of_vllm_is_what_its_rules_make_of_the_folder(family, tmp_path):
    base = load(family)
    for number, options in enumerate(OPTIONS):
        config = dl.DropLoRA(**{"rank": 4, "targets": "q_proj", **options})
        folder = tmp_path / str(number)
        limits = dl.save_adapter(dl.inject(base, config, key=dl.root_key(0)), folder)
        assert vllm_takes(folder, base.config.family) == (not limits), options


@pytest.mark.parametrize(
    ("options", "said"),
    [
        ({}, None),
        ({"rank_pattern": {"q_proj": 2}}, None),
        ({"rank_stabilized": True}, "scales every layer by lora_alpha / rank"),
        ({"alpha_pattern": {"q_proj": 2.0}}, "scales every layer by lora_alpha / rank"),
        ({"train_whole": ("lm_head",)}, "refuses it: it has embedding or head"),
    ],
    ids=str,
)
def test_what_is_said_of_the_converter_of_llama_cpp(options, said, untied, tmp_path):
    """It knows lora_alpha and the shapes of A and B, and takes norms besides."""
    config = dl.DropLoRA(rank=4, targets=("q_proj", "v_proj"), **options)
    text = export(dl.inject(load(untied), config, key=dl.root_key(0)), tmp_path / "out")
    assert (said in text) if said else ("llama.cpp" not in text)


@pytest.mark.parametrize("name", ["untied", "tied"])
def test_a_merged_folder_is_read_whole_by_vllm(name, request, tmp_path):
    """It takes `consolidated*` alone where there is one, else the files that the index names; the
    head of a tied model is passed over, and every parameter has to be among the rest.
    """
    base = request.getfixturevalue(name)
    config = dl.DropLoRA(rank=4, targets=("q_proj", "v_proj"))
    folder = tmp_path / "out"
    dl.save_merged(dl.inject(load(base), config, key=dl.root_key(0)), folder)
    assert not [*folder.glob("consolidated*"), *folder.glob("*.bin")]
    weight_map = json.loads((folder / "model.safetensors.index.json").read_text())["weight_map"]
    assert {file.name for file in folder.glob("*.safetensors")} == {*weight_map.values()}
    stored: set[str] = set()
    for file in {*weight_map.values()}:
        with safe_open(folder / file, "numpy") as shard:
            stored |= {*shard.keys()}
    parameters = {key for key, _ in base.torch.named_parameters()}
    assert stored - {"lm_head.weight"} == parameters - {"lm_head.weight"}
    assert ("lm_head.weight" in stored) or base.torch.config.tie_word_embeddings


def test_the_rank_that_vllm_has_to_make_room_for():
    assert vllm_options({"r": 16}) is None
    assert "--max-lora-rank 64" in vllm_options({"r": 8, "rank_pattern": {"q_proj": 33}})
    assert "--rank" in vllm_options({"r": 513})
