"""The tokenizer of a folder is what transformers makes of it."""

from __future__ import annotations

import json
import subprocess
import sys

import pytest
import tokenizers
import transformers
from data_fixtures import SENTENCES

from droplora_jax.core.errors import InputError
from droplora_jax.hf import tokenizer as loading
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
    theirs = transformers.AutoTokenizer.from_pretrained(tmp_path, local_files_only=True)
    theirs.backend_tokenizer.save(str(tmp_path / "tokenizer.json"))  # as its class splits texts
    ours = load_tokenizer(tmp_path)
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


def named(folder, base, **changes):
    """The base's tokenizer under other names in its configuration."""
    for name in ("config.json", "tokenizer.json", "tokenizer_config.json"):
        (folder / name).write_text((base / name).read_text())
    file = folder / "tokenizer_config.json"
    file.write_text(json.dumps({**json.loads(file.read_text()), **changes}))
    return folder


def stored_ids(folder, text):
    backend = tokenizers.Tokenizer.from_file(str(folder / "tokenizer.json"))
    return backend.encode(text, add_special_tokens=False).ids


CLASSES = ("LlamaTokenizer", "LlamaTokenizerFast", "Qwen2Tokenizer", "GPT2Tokenizer")


@pytest.mark.parametrize("name", CLASSES)
def test_ids_are_those_of_the_stored_tokenizer_whatever_it_is_called(base, tmp_path, name):
    folder = named(tmp_path, base, tokenizer_class=name, legacy=True)
    ours = load_tokenizer(folder)
    for text in (*TEXTS[:3], loading.SAMPLE):
        assert ours(text, add_special_tokens=False)["input_ids"] == stored_ids(folder, text)
        assert ours.decode(stored_ids(folder, text)) == text
    assert ours.eos_token == "</s>"


def test_a_class_that_splits_otherwise_is_passed_over(base, tmp_path, monkeypatch):
    """As older releases of transformers made LLaMA's SentencePiece kind of any such folder."""
    folder = named(tmp_path, base, tokenizer_class="LlamaTokenizerFast")
    wrong = transformers.LlamaTokenizer.from_pretrained(folder)
    assert wrong(loading.SAMPLE, add_special_tokens=False).input_ids != stored_ids(
        folder, loading.SAMPLE
    )
    monkeypatch.setattr(
        transformers.AutoTokenizer, "from_pretrained", lambda *args, **options: wrong
    )
    ours, is_transformers = loading.loaded(folder)
    assert not is_transformers
    assert ours.decode(ours("a b\n  c", add_special_tokens=False).input_ids) == "a b\n  c"


@pytest.mark.parametrize(
    "auto_map",
    [{"AutoTokenizer": ["tokenization_mine.Mine", None]}, ["tokenization_mine.Mine", None]],
)
def test_python_code_of_a_folder_is_named_and_not_run(base, tmp_path, auto_map, monkeypatch):
    folder = named(tmp_path, base, tokenizer_class="Mine", auto_map=auto_map)
    (folder / "tokenization_mine.py").write_text("raise SystemExit('was run')\n")
    monkeypatch.setattr("builtins.input", lambda *prompt: pytest.fail("asked at stdin"))
    with pytest.raises(InputError, match=r"auto_map='tokenization_mine\.Mine' is Python code"):
        load_tokenizer(folder)
    file = folder / "tokenizer_config.json"
    config = json.loads(file.read_text())
    file.write_text(json.dumps({**config, "tokenizer_class": "PreTrainedTokenizerFast"}))
    text = TEXTS[0]
    assert load_tokenizer(folder)(text, add_special_tokens=False).input_ids == stored_ids(
        folder, text
    )


def test_a_sentencepiece_model_alone(tmp_path, monkeypatch):
    sentencepiece = pytest.importorskip("sentencepiece")
    sentencepiece.SentencePieceTrainer.train(
        sentence_iterator=iter(SENTENCES * 4),
        model_prefix=str(tmp_path / "tokenizer"),
        vocab_size=320,
        model_type="bpe",
        byte_fallback=True,
        normalization_rule_name="identity",
        remove_extra_whitespaces=False,
        minloglevel=2,
    )
    (tmp_path / "config.json").write_text('{"model_type": "llama"}')
    config = {"tokenizer_class": "LlamaTokenizer", "bos_token": "<s>", "eos_token": "</s>"}
    (tmp_path / "tokenizer_config.json").write_text(json.dumps({**config, "legacy": True}))
    theirs = sentencepiece.SentencePieceProcessor(model_file=str(tmp_path / "tokenizer.model"))
    ours = load_tokenizer(tmp_path)
    for text in ("the answer is 7", "Below:\n  naïve 🙂"):
        assert ours(text, add_special_tokens=False)["input_ids"] == theirs.encode(text)
    monkeypatch.setattr(loading, "find_spec", lambda name: None)
    with pytest.raises(InputError, match=r"tokenizer\.model: .*droplora-jax\[sentencepiece\]"):
        load_tokenizer(tmp_path)
