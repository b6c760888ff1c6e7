"""Small tokenizers, files and rows for the tests of the data."""

from __future__ import annotations

import itertools
import json
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, processors, trainers
from transformers import LlamaTokenizer, PreTrainedTokenizerFast

from droplora_jax.core.errors import InputError
from droplora_jax.data.config import DataConfig
from droplora_jax.data.load import load
from droplora_jax.data.report import Report
from droplora_jax.data.rows import Flat, Row, Rows

SENTENCES = (
    "Below is an instruction that describes a task.",
    "Write a response that appropriately completes the request.",
    "### Instruction: ### Response: ### Input:",
    "the answer is true, the answer is false: 0 1 2 3 4 5 6 7 8 9",
)
BOS, EOS, START, END = "<s>", "</s>", "<|start|>", "<|end|>"
PROMPT, RESPONSE = "the answer: ", "is true 日本 🙂"
PAIR = {"prompt": PROMPT, "completion": RESPONSE}
ROW = {"instruction": "add", "input": "1 2", "output": "3"}  # of the format alpaca
CHATML = (
    "{% for m in messages %}<|start|>{{ m.role }}\n{{ m.content }}<|end|>\n{% endfor %}"
    "{% if add_generation_prompt %}<|start|>assistant\n{% endif %}"
)


def make_tokenizer(
    *,
    adds_bos: bool = True,
    adds_eos: bool = False,
    pad: str | None = None,
    eos: str | None = EOS,
    chat_template: str | dict[str, str] | None = None,
    sentences: Sequence[str] = SENTENCES,
    vocab_size: int = 340,
) -> PreTrainedTokenizerFast:
    """A byte-level BPE tokenizer, by default of 300-odd tokens."""
    backend = Tokenizer(models.BPE())
    backend.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    backend.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=vocab_size,
        special_tokens=[BOS, EOS, START, END],
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    backend.train_from_iterator(sentences, trainer)
    single = " ".join(([BOS] if adds_bos else []) + ["$A"] + ([EOS] if adds_eos else []))
    ids = [(token, backend.token_to_id(token)) for token in (BOS, EOS)]
    backend.post_processor = processors.TemplateProcessing(single=single, special_tokens=ids)
    tokenizer = PreTrainedTokenizerFast(
        tokenizer_object=backend,
        bos_token=BOS,
        eos_token=eos,
        pad_token=pad,
        additional_special_tokens=[START, END],
    )
    tokenizer.chat_template = chat_template
    return tokenizer


def make_sentencepiece(
    *,
    legacy: bool,
    pad: str | None = None,
    chat_template: str | None = None,
    sentences: Sequence[str] = SENTENCES,
    vocab_size: int = 200,
) -> LlamaTokenizer:
    """Llama 2's kind: spaces are words' first letters, bytes stand in for unknown letters.

    If `legacy`, a space is put before every text and behind every special token.
    """
    backend = Tokenizer(models.BPE())
    backend.pre_tokenizer = pre_tokenizers.Metaspace()
    trainer = trainers.BpeTrainer(vocab_size=vocab_size, show_progress=False)
    backend.train_from_iterator(sentences, trainer)
    learnt = json.loads(backend.to_str())["model"]
    tokens = ["<unk>", BOS, EOS, *(f"<0x{byte:02X}>" for byte in range(256)), *learnt["vocab"]]
    tokenizer = LlamaTokenizer(
        vocab={token: i for i, token in enumerate(tokens)},
        merges=[tuple(pair) for pair in learnt["merges"]],
        legacy=legacy,
        add_bos_token=True,
        pad_token=pad,
        additional_special_tokens=[START, END],
    )
    tokenizer.chat_template = chat_template
    return tokenizer


def write_json(path: Path, rows: object) -> str:
    path.write_text(json.dumps(rows, ensure_ascii=False), encoding="utf-8")
    return str(path)


def write_jsonl(path: Path, rows: list) -> str:
    path.write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")
    return str(path)


def random_rows(count: int, max_length: int, seed: int) -> list[Row]:
    """Rows in which every token occurs once, so that a label can be told from any other."""
    random = np.random.default_rng(seed)
    rows, next_id = [], 1
    for length in random.integers(2, max_length + 1, count).tolist():
        trained = random.random(length) < 0.5
        trained[0], trained[-1] = False, True
        rows.append(Row(np.arange(next_id, next_id + length, dtype=np.int32), trained))
        next_id += length
    return rows


def sources(*counts: int, length: int = 16) -> Rows:
    """Rows of several sources, in which every token occurs once."""
    rows = random_rows(sum(counts), length, seed=0)
    ends = list(itertools.accumulate(counts, initial=0))
    parts = [rows[a:b] for a, b in itertools.pairwise(ends)]
    return Rows([[Flat.of([row] for row in part)] for part in parts])


def loaded(folder: Path, records: list[Any], tokenizer: Any, **options: Any) -> tuple[Rows, Report]:
    """The rows of records, by way of a file."""
    path = write_json(folder / "a.json", records)
    return load(path, tokenizer, DataConfig(train=path, **options))


def fails(path: Path | str, config: DataConfig | None = None, *, match: str) -> str:
    """The error of a file that can't be loaded, which names the file."""
    config = config or DataConfig(train=str(path))
    with pytest.raises(InputError, match=match) as info:
        load(config.train, make_tokenizer(), config)
    assert str(path) in str(info.value)
    return str(info.value)


def assert_rows_equal(rows: Iterable[Row], others: Iterable[Row]) -> None:
    rows, others = list(rows), list(others)
    assert len(rows) == len(others) > 0
    for one, other in zip(rows, others, strict=True):
        np.testing.assert_array_equal(one.ids, other.ids)
        np.testing.assert_array_equal(one.trained, other.trained)
