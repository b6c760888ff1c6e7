"""The files beside a model's weights: of its base, and of an adapter that brings a tokenizer."""

from __future__ import annotations

from pathlib import Path

import pytest
from data_fixtures import CHATML, make_tokenizer
from transformers import AutoTokenizer

from droplora_jax.core.errors import InputError
from droplora_jax.hf.companions import adapter_tokenizer, companions, copy_files

OTHER = "{{ messages }}"


@pytest.fixture
def base(tmp_path) -> Path:
    folder = tmp_path / "base"
    make_tokenizer(
        chat_template={"default": CHATML, "tool_use": f"tools {CHATML}"}
    ).save_pretrained(folder)
    for name in ("config.json", "LICENSE", "tokenizer.model", "notes.txt", "model.safetensors"):
        (folder / name).write_text('{"model_type": "llama"}')
    for name in ("model.safetensors.index.json", "adapter_config.json", "droplora_merge.json"):
        (folder / name).write_text("{}")
    return folder


def test_what_travels_with_a_base(base, tmp_path):
    files = companions(base)
    assert files.keys() == {
        "config.json",
        "LICENSE",
        "tokenizer.model",
        "tokenizer.json",
        "tokenizer_config.json",
        "chat_template.jinja",
        "additional_chat_templates/tool_use.jinja",
    }
    copy_files(files, tmp_path / "copy")
    templates = AutoTokenizer.from_pretrained(tmp_path / "copy").chat_template
    assert templates == {"default": CHATML, "tool_use": f"tools {CHATML}"}


def test_a_tokenizer_of_the_adapter_s_takes_the_place_of_the_whole_of_the_base_s(base, tmp_path):
    tokenizer = make_tokenizer(chat_template=OTHER)
    tokenizer.add_special_tokens({"additional_special_tokens": ["<new>"]})
    tokenizer.eos_token = "<new>"
    tokenizer.save_pretrained(tmp_path / "adapter")
    (tmp_path / "adapter" / "adapter_config.json").write_text("{}")
    files = companions(base, tmp_path / "adapter")
    assert files.keys() == {
        "config.json",
        "LICENSE",
        "tokenizer.json",
        "tokenizer_config.json",
        "chat_template.jinja",
    }
    loaded = adapter_tokenizer(base, tmp_path / "adapter").tokenizer
    assert (loaded.eos_token, loaded.chat_template) == ("<new>", OTHER)
    assert loaded.get_vocab() == tokenizer.get_vocab()


def test_templates_of_the_adapter_s_take_the_place_of_the_base_s_templates(base, tmp_path):
    (tmp_path / "adapter").mkdir()
    (tmp_path / "adapter" / "chat_template.jinja").write_text(OTHER)
    loaded = adapter_tokenizer(base, tmp_path / "adapter").tokenizer
    assert loaded.chat_template == OTHER
    assert loaded.get_vocab() == AutoTokenizer.from_pretrained(base).get_vocab()
    assert "tokenizer.model" in companions(base, tmp_path / "adapter")


def test_a_broken_tokenizer_beside_an_adapter_is_named(base, tmp_path):
    (tmp_path / "adapter").mkdir()
    (tmp_path / "adapter" / "tokenizer.json").write_text("{}")
    with pytest.raises(InputError, match=r"adapter: no tokenizer could be loaded.*mend them"):
        adapter_tokenizer(base, tmp_path / "adapter")
