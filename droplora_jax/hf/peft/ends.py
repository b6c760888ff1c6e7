"""The embedding and the head that an adapter was trained with, where they are not the base's.

PEFT stores them beside the factors when the vocabulary was resized, or when it is asked to
(`save_embedding_layers`); and it trains the ends of a tied base apart, unless
`ensure_weight_tying` is on. Either way the function is that of a base with other ends.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import replace
from pathlib import Path

import numpy as np

from droplora_jax.core.errors import InputError
from droplora_jax.hf.companions import brings_tokenizer, tokenizer_files
from droplora_jax.hf.peft.folder import AdapterFolder
from droplora_jax.hf.peft.names import (
    EMBED,
    EMBEDDING_A,
    HEAD,
    PREFIX,
    B,
    BaseNames,
    is_copy,
    saved_module,
    split_key,
)
from droplora_jax.hf.tensor_files import TensorFiles, open_source
from droplora_jax.models.config import ModelConfig, OtherTensor, Source

HEAD_MODULE = HEAD.rpartition(".")[0]


def under(
    shape: ModelConfig, source: Source, adapters: Sequence[Path]
) -> tuple[ModelConfig, Source]:
    """A base as adapters have it: its shape, and where its tensors and its tokenizer come from.

    Raises:
      InputError: an adapter that was made for another base; or several, each of which brings ends
        or a tokenizer of its own.
    """
    for path in adapters:
        adapter = AdapterFolder.read(path)
        source = _with_tokenizer(source, path)
        shape, source = _with_ends(shape, source, adapter)
    return shape, source


def shape_under(shape: ModelConfig, adapter: AdapterFolder) -> ModelConfig:
    """The shape of a base as an adapter has it: of its vocabulary, and tied or not."""
    tables = _tables(shape, adapter)
    if shape.tie_embeddings and _trained_apart(shape, adapter):
        shape = replace(shape, tie_embeddings=False)
    rows = {adapter.tensors.shape(name)[0] for name in tables.values()}
    if len(rows) > 1:
        raise InputError(
            f"{adapter.file}: {' and '.join(tables.values())} have {' and '.join(map(str, rows))} "
            "rows: embedding and head must be of one vocabulary"
        )
    shape = replace(shape, vocab_size=rows.pop()) if rows else shape
    _check_factors(shape, adapter)
    return shape


def frozen_copies(shape: ModelConfig, adapter: AdapterFolder) -> set[str]:
    """The tables of the ends that are stored with the factors and were not trained."""
    tables = _tables(shape, adapter)
    modules = {tensor: tensor.rpartition(".")[0] for tensor in tables}
    trained = {tensor for tensor, name in modules.items() if saved_module(adapter.fields, name)}
    if shape.tie_embeddings and trained:
        trained = set(tables)
    return {key for tensor, key in tables.items() if is_copy(key) or tensor not in trained}


def copies_to_store(
    source: Source | None, adapted: Mapping[str, bool], trained: Sequence[str]
) -> dict[str, np.ndarray]:
    """The ends that are not the base's, by PEFT's names for what it stores of them.

    Args:
      adapted: for the tensors of ends, whether they have factors.
      trained: the tensors that are stored already, because they are trained as they are.
    """
    if source is None:
        return {}
    changed = [other.name for other in source.others if other.file is not None]
    if source.added is not None:
        changed += [name for name in source.added.tables if name in adapted]
    copies = {}
    for name in dict.fromkeys(changed):
        if name in trained:
            continue
        module, _, last = name.rpartition(".")
        beside = ".base_layer" if adapted.get(name) else ""
        key = f"{PREFIX}{module}{beside}.{last}"
        copies[key] = open_source(source).read(name, dtype=np.float32)
    return copies


def _with_tokenizer(source: Source, adapter: Path) -> Source:
    if not brings_tokenizer(adapter):
        return source
    if source.tokenizer not in (None, adapter):
        ours, theirs = (
            {name: file.read_bytes() for name, file in tokenizer_files(path).items()}
            for path in (source.tokenizer, adapter)
            if path is not None
        )
        if ours != theirs:
            raise InputError(
                f"{adapter} and {source.tokenizer} bring different tokenizers, and a sum has one: "
                "take the files of the tokenizer out of a copy of the folder whose tokenizer is "
                "not to count"
            )
        return source
    return replace(source, tokenizer=adapter)


def _with_ends(
    shape: ModelConfig, source: Source, adapter: AdapterFolder
) -> tuple[ModelConfig, Source]:
    tables = _tables(shape, adapter)
    new = shape_under(shape, adapter)
    if source.added is not None and new.vocab_size < source.added.stop:
        raise InputError(
            f"{adapter.file}: brings tables of {new.vocab_size} rows, in which the tokens that "
            f"were added to the base ({', '.join(source.added.texts)}) have none; open the base "
            "without add_tokens"
        )
    base = open_source(source)
    others = {other.name: other for other in source.others}
    embedding = BaseNames(new).table["embed.embedding"].pattern
    for tensor, key in tables.items():
        if tensor == HEAD and new.tie_embeddings:
            continue  # equal to the embedding's
        if adapter.tensors.shape(key)[1:] != (shape.width,):
            raise InputError(
                f"{adapter.file}: {key} has shape {list(adapter.tensors.shape(key))}, but the base "
                f"is {shape.width} wide: the adapter was made for another base"
            )
        replaced = tensor if tensor in base.files else embedding
        trained = key not in frozen_copies(shape, adapter)
        if new.vocab_size == shape.vocab_size and (
            trained or _same(adapter.tensors, key, base, replaced)
        ):
            continue
        if (other := others.get(tensor)) is not None and other.file is not None:
            raise InputError(
                f"{adapter.path} and {other.file.parent} bring different tables for {tensor}: only "
                "one of several adapters can. Merge one with its base first (--format merged)"
            )
        others[tensor] = OtherTensor(tensor, adapter.stored[key], adapter.file)
    if new.tie_embeddings and HEAD in base.files and embedding in others:
        others[HEAD] = replace(others[embedding], name=HEAD)  # the base's file has a copy
    if HEAD not in base.files and HEAD not in others and not new.tie_embeddings:
        others[HEAD] = OtherTensor(HEAD, embedding)
    _check_rows(new, shape, set(others), adapter)
    return new, replace(source, others=tuple(others.values()))


def _tables(shape: ModelConfig, adapter: AdapterFolder) -> dict[str, str]:
    """The tables of the ends in an adapter's file: their keys, by the tensors of the base."""
    names = BaseNames(shape)
    ends = {names.table["embed.embedding"].pattern, HEAD}
    tables: dict[str, str] = {}
    for key in adapter.stored:
        tensor, part = split_key(key)
        if part is None and tensor in ends and len(adapter.tensors.shape(key)) == 2:
            tables[tensor] = key
    return tables


def _trained_apart(shape: ModelConfig, adapter: AdapterFolder) -> bool:
    """Whether the ends of a tied base are two in an adapter."""
    peft, tables, tensors = adapter.fields, _tables(shape, adapter), adapter.tensors
    modules = (BaseNames(shape).module(EMBED, 0), HEAD_MODULE)
    trained = any(saved_module(peft, module) for module in modules) or any(
        module in modules for module, part in map(split_key, adapter.stored) if part is not None
    )
    if trained and (not peft.get("ensure_weight_tying") or peft.get("use_dora")):
        return True
    if len(tables) < 2:
        return False
    one, other = tables.values()
    return not _same(tensors, one, tensors, other)


def _same(ours: TensorFiles, name: str, theirs: TensorFiles, other: str) -> bool:
    """Whether two stored tensors are one, in the coarser of their dtypes."""
    if ours.shape(name) != theirs.shape(other):
        return False
    dtype = min(ours.dtype(name), theirs.dtype(other), key=lambda dtype: dtype.itemsize)
    return np.array_equal(ours.read(name, dtype=dtype), theirs.read(other, dtype=dtype))


def _check_factors(shape: ModelConfig, adapter: AdapterFolder) -> None:
    """Raise InputError for factors of ends with other rows, whose tables are not stored."""
    embedding = BaseNames(shape).module(EMBED, 0)
    rows = {f"{embedding}{EMBEDDING_A}": 1, f"{HEAD_MODULE}{B}": 0}
    for name, axis in rows.items():
        key = PREFIX + name
        if key not in adapter.stored:
            continue
        size = adapter.tensors.shape(key)[axis]
        if size != shape.vocab_size:
            raise InputError(
                f"{adapter.file}: {key} is for {size} tokens, the base has {shape.vocab_size}: the "
                "vocabulary was resized before training, but the tables with the further rows are "
                "not stored. Save the adapter again with save_pretrained(DIR, "
                "save_embedding_layers=True), or name the base with these rows"
            )


def _check_rows(
    new: ModelConfig, shape: ModelConfig, brought: set[str], adapter: AdapterFolder
) -> None:
    """Raise InputError if only one of the ends is of another vocabulary."""
    if new.vocab_size == shape.vocab_size:
        return
    needed = {BaseNames(new).table["embed.embedding"].pattern}
    needed |= set() if new.tie_embeddings else {HEAD}
    if missing := needed - brought:
        raise InputError(
            f"{adapter.file}: {', '.join(sorted(brought))} has {new.vocab_size} rows, the base "
            f"{shape.vocab_size}, but {', '.join(missing)} of as many rows is not stored: save the "
            "adapter again with save_pretrained(DIR, save_embedding_layers=True)"
        )
