"""One contract for every family of models: transformers, PEFT, and there and back bit for bit."""

from __future__ import annotations

import numpy as np
import peft
import pytest
import torch
from flax import nnx
from gradients import loss_and_gradients
from oracles import Folder, model_folder, random_tokens, randomized, relative
from safetensors.numpy import load_file
from small_models import load
from transformers import AutoModelForCausalLM

import droplora_jax as dl
from droplora_jax.hf.peft.adapter import adapter_tensors
from droplora_jax.models.families import FAMILIES
from droplora_jax.models.parameter_table import PARAMETERS
from droplora_jax.nn.options import StepOptions

pytestmark = pytest.mark.usefixtures("strict")

LONG = 96  # more than the 32 positions that the scaled ones were made for
LLAMA3 = {"rope_type": "llama3", "factor": 8.0, "low_freq_factor": 1.0, "high_freq_factor": 4.0}
YARN = {"rope_type": "yarn", "rope_theta": 1e6, "factor": 4.0}
WINDOWS = {"use_sliding_window": True, "sliding_window": 7}
CASES = {
    "llama": (
        "llama",
        {
            "rope_parameters": {
                **LLAMA3,
                "rope_theta": 5e5,
                **{"original_max_position_embeddings": 32},
            }
        },
    ),
    "llama, tied": ("llama", {"tie_word_embeddings": True}),
    "llama, biases": ("llama", {"attention_bias": True, "mlp_bias": True}),
    "llama, dynamic": (
        "llama",
        {
            "max_position_embeddings": 32,
            "rope_parameters": {"rope_type": "dynamic", "rope_theta": 1e4, "factor": 3.0},
        },
    ),
    "mistral": ("mistral", {"sliding_window": 7}),
    "mistral, no window": ("mistral", {"sliding_window": None}),
    "qwen2": ("qwen2", {}),
    "qwen2, windows": ("qwen2", {**WINDOWS, "max_window_layers": 1}),
    "qwen2, yarn": (
        "qwen2",
        {
            "tie_word_embeddings": True,
            "rope_parameters": {**YARN, "original_max_position_embeddings": 32},
        },
    ),
    "qwen3": ("qwen3", {"head_dim": 16, "tie_word_embeddings": True}),
    "qwen3, windows and biases": (
        "qwen3",
        {
            **WINDOWS,
            "head_dim": 16,
            "attention_bias": True,
            "layer_types": ["sliding_attention", "full_attention", "sliding_attention"],
        },
    ),
}


@pytest.fixture(scope="module", params=CASES)
def folder(request, tmp_path_factory) -> Folder:
    model_type, options = CASES[request.param]
    return model_folder(tmp_path_factory.mktemp("model"), model_type, **options)


@nnx.jit
def forward(model, tokens, segment_ids=None):
    return model(tokens, segment_ids=segment_ids)


def test_every_family_has_a_case():
    assert {model_type for model_type, _ in CASES.values()} == FAMILIES.keys()


def test_logits_equal_transformers(folder):
    tokens = random_tokens(2, LONG)
    assert relative(forward(load(folder), tokens), folder.logits(tokens)) < 1e-5


def test_padded_rows_equal_transformers(folder):
    """A whole row, one padded on the right, one on the left."""
    tokens, positions = random_tokens(3, 20), np.arange(20)
    real = np.stack([positions >= 0, positions < 11, positions >= 13])
    tokens = np.where(real, tokens, 0)
    expected = folder.logits(tokens, real.astype(np.int64))
    logits = np.asarray(forward(load(folder), tokens, real.astype(np.int32)))
    assert np.isfinite(logits).all()
    assert relative(logits[real], expected[real]) < 1e-5


# Every policy with one family (`test_decoder.py`), and every family with one policy; where more
# than one is listed, the layers differ, or attention has a window.
REMATS = {"qwen3, windows and biases": ("everything", "dots"), "mistral": ("attention",)}


def test_adapter_gradients_equal_peft_under_remat(folder, request):
    tokens = random_tokens(2, 24)
    config = dl.DropLoRA(rank=4, alpha=6.0, targets="all-linear")
    model = randomized(dl.inject(load(folder), config, key=dl.root_key(0)))
    theirs = peft.get_peft_model(
        AutoModelForCausalLM.from_pretrained(folder.path, dtype=torch.float32),
        peft.LoraConfig(r=4, lora_alpha=6, target_modules="all-linear", lora_dropout=0.0),
    )
    weights = {name: torch.tensor(value) for name, value in adapter_tensors(model).items()}
    peft.set_peft_model_state_dict(theirs, weights)
    batch = torch.tensor(tokens, dtype=torch.long)
    expected_loss = theirs(batch, labels=batch).loss
    expected_loss.backward()
    expected = {name: p.grad for name, p in theirs.named_parameters() if "lora_" in name}

    for remat in REMATS.get(request.node.callspec.params["folder"], ("nothing",)):
        loss, gradients = loss_and_gradients(model, tokens, options=StepOptions(remat=remat))
        assert relative(loss, expected_loss.detach()) < 1e-5
        compared, names = 0, {row.path: row.tensor for row in PARAMETERS}
        for (*path, factor), gradient in gradients.items():
            module = names[f"{'.'.join(path)}.kernel"].module
            letter = {"lora_a": "lora_A", "lora_b": "lora_B"}[factor]
            for layer in range(3):
                name = f"base_model.model.{module.format(layer=layer)}.{letter}.default.weight"
                assert relative(gradient[layer].T, expected[name]) < 1e-4, name
                compared += 1
        assert compared == len(expected) == 2 * 7 * 3


def test_there_and_back_bit_for_bit(folder, tmp_path):
    """An adapter that does nothing: the same files. One that does: what transformers computes."""
    tokens = random_tokens(2, LONG)
    config = dl.DropLoRA(rank=4, alpha=6.0, targets="all-linear")
    model = dl.inject(load(folder), config, key=dl.root_key(0))
    dl.save_merged(model, tmp_path / "same")
    files = sorted(path.name for path in folder.path.glob("*.safetensors"))
    assert files
    for file in files:
        base, same = load_file(folder.path / file), load_file(tmp_path / "same" / file)
        assert base.keys() == same.keys()
        assert all(base[name].tobytes() == same[name].tobytes() for name in base)

    model = randomized(model)
    dl.save_merged(model, tmp_path / "merged")
    theirs = AutoModelForCausalLM.from_pretrained(tmp_path / "merged", dtype=torch.float32)
    logits = forward(model, tokens)
    assert relative(Folder(tmp_path, theirs).logits(tokens), logits) < 1e-4
    assert relative(logits, folder.logits(tokens)) > 0.1
