"""What was verified of a merged folder, and what its user should know, in sentences."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import numpy as np

from droplora_jax.core.errors import InputError
from droplora_jax.hf.companions import has_vocabulary
from droplora_jax.hf.source import base_ties, base_vocabulary, source_of_model
from droplora_jax.hf.tensor_files import Each
from droplora_jax.hf.tokenizer import load_tokenizer
from droplora_jax.hf.verify import Read, over_quantized
from droplora_jax.models.decoder import Decoder
from droplora_jax.nn.options import Quantization

WORST = 3  # tensors that are named
MUCH = 0.1  # of an adapter, lost by rounding, that is worth another dtype


@dataclass(frozen=True)
class MergeReport:
    """What was written, and what casting the merge to the stored dtype took of the adapter.

    Attributes:
      tensors: number of tensors in the folder; `merged` of them hold an adapter.
      rounding: per merged tensor, ||stored delta - delta|| / ||delta||, largest first.
      difference: of the folder's float32 logits from base + adapter's, relative (see `probe`).
      notes: what the folder has from the adapter and not from the base, in sentences.
    """

    folder: Path
    tensors: int
    merged: int
    rounding: tuple[tuple[str, float], ...]
    difference: float
    notes: tuple[str, ...] = ()

    def __str__(self) -> str:
        text = (
            f"{self.folder}: {self.merged} of {self.tensors} tensors merged; read back bit for "
            f"bit; float32 logits differ from those of base + adapter by {self.difference:.1e}"
        )
        worst = [f"{name} {loss:.1e}" for name, loss in self.rounding[:WORST] if loss]
        if worst:
            median = float(np.median([loss for _, loss in self.rounding]))
            text += (
                f"\nrounding to the stored dtype took {median:.1e} of the adapter (relative, "
                f"median of the tensors), at most: {', '.join(worst)}"
            )
            if median > MUCH:
                text += (
                    "\nthat may change its answers: dtype float32 (--dtype float32) keeps all of "
                    "it, in a larger folder, and an export in PEFT's format rounds nothing"
                )
        return "\n".join([text, *self.notes])


def from_adapter(model: Decoder) -> Iterator[str]:
    """What a merged folder has from the adapter, besides the sums."""
    source = source_of_model(model)
    if source.tokenizer is not None:
        yield f"the tokenizer and its chat templates are the adapter's, from {source.tokenizer}"
    if source.added is not None:
        yield f"the tokenizer has further special tokens: {', '.join(source.added.texts)}"
    rows, before = model.config.vocab_size, base_vocabulary(source)
    if rows != before:
        yield f"the vocabulary is the adapter's: {rows} rows, where the base has {before}"
    if base_ties(source) and not model.config.tie_embeddings:
        yield (
            "embedding and head are two tables, though the base's config.json ties them: the "
            "merged model is untied (tie_word_embeddings: false)"
        )


def over_quantized_base(
    model: Decoder, stored: Read, quantization: Quantization | None, folder: Path, each: Each
) -> Iterator[str]:
    """What it changes that the base of the merge is not the quantised one of the training."""
    if quantization is None or not quantization.kinds:
        return
    kinds = ", ".join(quantization.kinds)
    try:
        off = over_quantized(model, stored, quantization, folder, each)
    except InputError as error:
        yield f"the adapter was trained over a base in {kinds}; what that changes: {error}"
        return
    yield (
        f"the adapter was trained over the base in {kinds}, and is merged into the base as it is "
        f"stored: logits differ from those of the quantised base with the adapter by {off:.1e} "
        "(relative, random tokens). Compare the two on your own data: droplora evaluate takes the "
        "run or the adapter (--quantize) and the merged folder"
    )


def without_rows(model: Decoder, folder: Path) -> Iterator[str]:
    """Tokens of the folder's tokenizer that the embedding has no row for."""
    if not has_vocabulary(folder):
        return
    try:
        tokens: dict[str, int] = load_tokenizer(folder).get_vocab()
    except InputError as error:
        yield str(error).replace(str(folder), "the merged folder")
        return
    rows = model.config.vocab_size
    if outside := sorted((i, token) for token, i in tokens.items() if i >= rows):
        yield (
            f"the model's {rows} rows have no place for {len(outside)} of the tokenizer's tokens, "
            f"such as {outside[0][1]!r} (id {outside[0][0]}): a prompt with one fails, and "
            "llama.cpp's converter refuses such a folder. Take them out of the tokenizer, or train "
            "on a base whose embedding was resized"
        )
