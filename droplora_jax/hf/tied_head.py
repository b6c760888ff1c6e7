"""Whether the head of a base is its embedding, by what its files hold.

`tie_word_embeddings` in `config.json` is a claim. Files with one of the two tables bear it out,
under either name; files with both do if the two are equal, and transformers takes them so.
"""

from __future__ import annotations

from dataclasses import replace

import numpy as np

from droplora_jax.hf.tensor_files import TensorFiles, has_weights, open_folder
from droplora_jax.models.config import ModelConfig, OtherTensor, Source
from droplora_jax.models.families import FAMILIES

ROWS = 16_384  # of both tables that are compared at a time


def as_stored(shape: ModelConfig, source: Source) -> tuple[ModelConfig, Source]:
    """A base whose `config.json` ties the head, as its files have it.

    Two tables that differ are those of an untied model. A head alone is the embedding as well.
    Without weights beside it, `config.json` is believed.
    """
    if not shape.tie_embeddings or not has_weights(source.folder):
        return shape, source
    untied = replace(shape, tie_embeddings=False)
    names = FAMILIES[shape.family].tensor_names(untied)
    embedding, head = (names[path].pattern for path in ("embed.embedding", "lm_head.kernel"))
    tensors = open_folder(source.folder)
    if head not in tensors.files:
        return shape, source
    if embedding not in tensors.files:
        return shape, replace(source, others=(*source.others, OtherTensor(embedding, head)))
    return (shape if _equal(tensors, embedding, head) else untied), source


def _equal(tensors: TensorFiles, name: str, other: str) -> bool:
    if (shape := tensors.shape(name)) != tensors.shape(other):
        return False
    if tensors.dtype(name) != tensors.dtype(other):
        return False
    chunks = [(slice(first, first + ROWS),) for first in range(0, shape[0], ROWS)]
    return all(np.array_equal(tensors.read(name, c), tensors.read(other, c)) for c in chunks)
