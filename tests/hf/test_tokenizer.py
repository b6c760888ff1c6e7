"""The tokenizer of a folder is what transformers makes of it."""

from __future__ import annotations

import json
import subprocess
import sys

import pytest
import transformers

from droplora_jax.hf.tokenizer import load_tokenizer

TEXTS = ["Is 7 odd? no", "  spaces\n\nand lines ", "émoji 🙂", "<s>a</s>"]


@pytest.mark.parametrize("kind", ["PreTrainedTokenizerFast", "TokenizersBackend", None])
@pytest.mark.parametrize("family", ["llama", "qwen2", "qwen3", "mistral"])
def test_it_is_the_one_of_auto_tokenizer(base, tmp_path, kind, family):
    for name, key, value in [
        ("config.json", "model_type", family),
        ("tokenizer_config.json", "tokenizer_class", kind),
    ]:
        said = json.loads((base / name).read_text())
        said[key] = value
        (tmp_path / name).write_text(json.dumps({k: v for k, v in said.items() if v is not None}))
    (tmp_path / "tokenizer.json").write_text((base / "tokenizer.json").read_text())
    ours = load_tokenizer(tmp_path)
    theirs = transformers.AutoTokenizer.from_pretrained(tmp_path, local_files_only=True)
    assert type(ours) is type(theirs)
    assert ours.special_tokens_map == theirs.special_tokens_map
    assert ours.init_kwargs.keys() - {"name_or_path"} == theirs.init_kwargs.keys() - {
        "name_or_path"
    }
    for text in TEXTS:
        assert ours(text)["input_ids"] == theirs(text)["input_ids"]
        assert ours.decode(ours(text)["input_ids"]) == theirs.decode(theirs(text)["input_ids"])


def test_pytorch_is_not_imported_and_nothing_is_said(base):
    program = (
        "import sys, pathlib; from droplora_jax.hf.tokenizer import load_tokenizer\n"
        f"load_tokenizer(pathlib.Path({str(base)!r}))\n"
        "print('torch' in sys.modules)"
    )
    done = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True)
    assert (done.stdout, done.stderr) == ("False\n", "")
