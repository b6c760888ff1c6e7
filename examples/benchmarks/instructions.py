"""Real instruction data: a file of `instruction`, `input`, `output`, through our own pipeline."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
from work import Row

LINE = 1024  # tokens of a line, if rows are packed


def train_tokenizer(file: Path, vocab_size: int) -> Any:
    """A byte-level BPE of the file's own text: rows have realistic lengths, and no download."""
    from tokenizers import Tokenizer, models, pre_tokenizers, trainers
    from transformers import PreTrainedTokenizerFast

    records = json.loads(file.read_text(encoding="utf-8"))
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    trainer = trainers.BpeTrainer(
        vocab_size=vocab_size,
        special_tokens=["<s>", "</s>"],
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    tokenizer.train_from_iterator(
        (text for record in records for text in record.values() if isinstance(text, str)), trainer
    )
    return PreTrainedTokenizerFast(
        tokenizer_object=tokenizer, bos_token="<s>", eos_token="</s>", pad_token="</s>"
    )


def real_rows(file: Path, tokenizer: Any, count: int, cache: Path) -> tuple[Row, ...]:
    """So many rows of the file, drawn once, in the order in which they are trained."""
    from droplora_jax.data.config import DataConfig
    from droplora_jax.data.load import load

    config = DataConfig(train=str(file), max_length=LINE, cache=str(cache))
    rows, _ = load(config.train, tokenizer, config)
    chosen = np.random.default_rng(0).permutation(len(rows))[:count]
    return tuple(Row(rows[int(i)].ids, rows[int(i)].trained) for i in chosen)


def lines_a_step(rows: tuple[Row, ...], batch: int) -> int:
    """How many lines hold about as many rows as a padded batch."""
    return max(1, round(batch * sum(len(row.ids) for row in rows) / len(rows) / LINE))


def first_rows(rows: tuple[Row, ...], batch: int, lines: int) -> int:
    """How many of the rows, up to a batch, fit into the lines of one step."""
    from droplora_jax.data import batches
    from droplora_jax.data import rows as examples

    def needed(count: int) -> int:
        own = [examples.Row(row.ids, row.trained) for row in rows[:count]]
        return batches.Batches(
            own,
            batch_size=lines,
            seed=0,
            shuffle=False,
            max_length=LINE,
            packing="best_fit",
        ).sequences_per_epoch

    return max(count for count in range(1, batch + 1) if needed(count) <= lines)
