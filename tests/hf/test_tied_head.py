"""Tied bases in the forms that files have them in, and what is merged into each."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import pytest
import torch
from oracles import Folder, randomized
from safetensors.numpy import load_file, save_file
from small_models import load
from transformers import AutoModelForCausalLM

import droplora_jax as dl
from droplora_jax.hf.base import Base

EMBEDDING, HEAD = "model.embed_tokens.weight", "lm_head.weight"


def stored(folder: Path) -> dict[str, np.ndarray]:
    tensors: dict[str, np.ndarray] = {}
    for file in sorted(folder.glob("*.safetensors")):
        tensors |= load_file(file)
    return tensors


def write(folder: Path, tied: Folder, tensors: dict[str, np.ndarray]) -> Path:
    folder.mkdir()
    (folder / "config.json").write_bytes((tied.path / "config.json").read_bytes())
    save_file(tensors, folder / "model.safetensors", metadata={"format": "pt"})
    return folder


@pytest.fixture
def base(request: pytest.FixtureRequest, tied: Folder, tmp_path: Path) -> Path:
    """A tied base, stored in one of the forms."""
    tensors = stored(tied.path)
    embedding = tensors[EMBEDDING]
    forms = {
        "a copy": {**tensors, HEAD: embedding.copy()},
        "the head alone": {k: v for k, v in tensors.items() if k != EMBEDDING} | {HEAD: embedding},
        "another head": {**tensors, HEAD: embedding[::-1].copy()},
        "no prefix": {name.removeprefix("model."): value for name, value in tensors.items()},
    }
    return write(tmp_path / "base", tied, forms[request.param])


def ends_of(folder: Path) -> list[np.ndarray]:
    """Embedding and head as transformers has them."""
    model = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32)
    ends = (model.get_input_embeddings(), model.get_output_embeddings())
    return [end.weight.detach().numpy() for end in ends]


@pytest.mark.parametrize(
    "base", ["a copy", "the head alone", "another head", "no prefix"], indirect=True
)
def test_a_tied_base_is_read_as_transformers_does(base, tied):
    model = load(base)
    embedding, head = ends_of(base)
    np.testing.assert_array_equal(model.embed.embedding[...], embedding)
    apart = not np.array_equal(embedding, head)
    assert model.config.tie_embeddings is not apart
    assert hasattr(model, "lm_head") is apart
    if apart:
        np.testing.assert_array_equal(model.lm_head.kernel[...].T, head)
    layers = tied.torch.model.layers
    np.testing.assert_array_equal(
        model.layers.up_proj.kernel[...][1].T, layers[1].mlp.up_proj.weight.detach().numpy()
    )


@pytest.mark.parametrize(
    "base", ["a copy", "the head alone", "another head", "no prefix"], indirect=True
)
def test_a_merge_leaves_no_stale_head(base, tmp_path):
    config = dl.DropLoRA(rank=2, alpha=4.0, targets="embed")
    model = randomized(dl.inject(load(base), config, key=dl.root_key(0)))
    report = dl.save_merged(model, tmp_path / "merged")
    assert ("config.json ties them" in str(report)) is not model.config.tie_embeddings
    merged = dl.merge(model)
    embedding, head = ends_of(tmp_path / "merged")
    np.testing.assert_allclose(embedding, merged.embed.embedding[...], rtol=1e-5, atol=1e-6)
    expected = merged.lm_head.kernel[...].T if hasattr(merged, "lm_head") else embedding
    np.testing.assert_allclose(head, expected, rtol=1e-5, atol=1e-6)
    assert not np.array_equal(embedding, ends_of(base)[0])

    out = stored(tmp_path / "merged")
    assert all(name.startswith(("model.", HEAD)) for name in out)
    tie = json.loads((tmp_path / "merged" / "config.json").read_text())["tie_word_embeddings"]
    assert tie is model.config.tie_embeddings
    assert Base.open(tmp_path / "merged").shape == model.config


def test_a_head_that_is_missing_names_the_key(tied, tmp_path):
    base = write(tmp_path / "base", tied, stored(tied.path))
    config = json.loads((base / "config.json").read_text())
    (base / "config.json").write_text(json.dumps({**config, "tie_word_embeddings": False}))
    with pytest.raises(dl.InputError, match=r'lm_head\.weight.*"tie_word_embeddings": true'):
        load(base)


def test_without_weights_the_configuration_is_believed(tied, tmp_path):
    (tmp_path / "config.json").write_bytes((tied.path / "config.json").read_bytes())
    assert Base.open(tmp_path).shape.tie_embeddings
