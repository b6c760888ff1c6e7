"""The tokens at which a folder's model stops, as transformers reads them."""

from __future__ import annotations

import json

import pytest
from transformers import GenerationConfig

from droplora_jax.hf.generation_config import add_end_tokens, eos_ids

SAMPLED = {"do_sample": True, "temperature": 0.6, "top_p": 0.9}


@pytest.mark.parametrize(
    ("generation", "config", "added", "expected"),
    [
        ({**SAMPLED, "eos_token_id": 2}, {"eos_token_id": 9}, (5,), [2, 5]),
        ({**SAMPLED, "eos_token_id": [2, 3]}, {}, (5, 3), [2, 3, 5]),
        ({"bos_token_id": 1}, {"eos_token_id": 2}, (5,), [2, 5]),
        (None, {"eos_token_id": 2, "bos_token_id": 1, "pad_token_id": None}, (5,), [2, 5]),
        (None, {}, (5,), [5]),
    ],
)
def test_end_tokens_join_those_that_the_folder_names(tmp_path, generation, config, added, expected):
    (tmp_path / "config.json").write_text(json.dumps({"model_type": "llama", **config}))
    if generation is not None:
        (tmp_path / "generation_config.json").write_text(json.dumps(generation))
    add_end_tokens(tmp_path, added)
    theirs = GenerationConfig.from_pretrained(tmp_path)
    assert theirs.eos_token_id == expected == list(eos_ids(tmp_path))
    kept = generation or {"bos_token_id": config.get("bos_token_id")}
    assert all(getattr(theirs, key) == kept[key] for key in kept if key != "eos_token_id")


@pytest.mark.parametrize("added", [(), (2,)])
def test_nothing_is_written_where_nothing_is_new(tmp_path, added):
    text = '{"eos_token_id":   2}'
    (tmp_path / "config.json").write_text("{}")
    (tmp_path / "generation_config.json").write_text(text)
    add_end_tokens(tmp_path, added)
    assert (tmp_path / "generation_config.json").read_text() == text
