"""Files to tokenised rows, each step of the way named where it is done."""

from __future__ import annotations

import hashlib
from collections import Counter
from collections.abc import Iterable, Iterator, Mapping, Sequence
from itertools import chain, islice
from os import PathLike, fspath
from typing import Any

import numpy as np

from droplora_jax.data import files
from droplora_jax.data.config import AUTO, DataConfig
from droplora_jax.data.encode import encode
from droplora_jax.data.formats import FORMATS
from droplora_jax.data.report import Report, Source
from droplora_jax.data.rows import Row, Rows
from droplora_jax.data.templates import TEMPLATES, Document
from droplora_jax.data.templates.base import Tokenizer
from droplora_jax.errors import InputError

_CHUNK = 1024  # records tokenised in one call, which is several times faster than one by one


def load(
    paths: str | PathLike[str] | Sequence[str | PathLike[str]],
    tokenizer: Tokenizer,
    config: DataConfig,
) -> tuple[Rows, Report]:
    """Read, write out, tokenise and shorten the rows of one file or several.

    Args:
      paths: of the files; `config.train` or `config.valid`.
      tokenizer: a Hugging Face tokenizer.
      config: `train` and `valid` are not looked at.

    Raises:
      InputError: names the file, the line, and the rule; or says why no row is left.
    """
    several = (paths,) if isinstance(paths, str | PathLike) else paths
    names = tuple(fspath(path) for path in several)
    sources: list[Source] = []
    rows: list[Row] = []
    counts: Counter[str] = Counter()
    for path in names:
        raw = files.content(path)
        records = files.records(path, raw)
        first = next(records)
        format, template = _kinds(*first, config)
        read = 0
        for where, document, row in _encoded(chain([first], records), format, template, tokenizer):
            rows += _fit(row, where, document.split, config, counts)
            read += 1
        sources.append(Source(path, format, template, read, hashlib.sha256(raw).hexdigest()))
    if not rows:
        raise InputError(_none_left(names, counts, config.max_length))
    kept = Rows(rows)
    return kept, _report(kept, tuple(sources), counts, config.max_length)


def _kinds(where: str, record: Mapping[str, Any], config: DataConfig) -> tuple[str, str]:
    """The names of a file's format and template, by its first record."""
    name = config.format
    if name == AUTO:
        matching = [name for name, format in FORMATS.items() if format.matches(record)]
        if not matching:
            known = "; ".join(f"{name} ({format.keys})" for name, format in FORMATS.items())
            raise InputError(
                f"{where}: no format has the keys {', '.join(record) or '(none)'}; the formats "
                f"are {known}"
            )
        name = matching[0]
    return name, FORMATS[name].template if config.template == AUTO else config.template


def _encoded(
    records: Iterable[files.Record], format: str, template: str, tokenizer: Tokenizer
) -> Iterator[tuple[str, Document, Row]]:
    """Where each record stands, the record written out, and its row, however long."""
    records = iter(records)
    while chunk := list(islice(records, _CHUNK)):
        documents = [_document(*record, format, template, tokenizer) for record in chunk]
        places = [where for where, _ in chunk]
        yield from zip(places, documents, encode(documents, tokenizer), strict=True)


def _document(
    where: str, record: Mapping[str, Any], format: str, template: str, tokenizer: Tokenizer
) -> Document:
    try:
        example = FORMATS[format].convert(record)
    except InputError as error:
        keys = FORMATS[format].keys
        raise InputError(f"{where}: {error}; the format {format} has the keys {keys}") from error
    try:
        return TEMPLATES[template](example, tokenizer)
    except InputError as error:
        raise InputError(f"{where}: {error}") from error


def _fit(
    row: Row, where: str, splittable: bool, config: DataConfig, counts: Counter[str]
) -> list[Row]:
    """The row as one or more of at most `max_length` tokens, or none; counts what it does."""
    limit = config.max_length
    long = len(row) > limit
    if long and splittable:
        pieces = row.split(limit)
        counts["split"] += 1
        counts["pieces"] += len(pieces)
        return pieces
    if long and config.too_long == "error":
        raise InputError(
            f"{where}: {len(row):,} tokens are more than data.max_length={limit}; raise it, or set "
            "data.too_long to cut or drop"
        )
    if long and config.too_long == "drop":
        counts["dropped_long"] += 1
        return []
    row = row.first(limit)
    if not row.trained.any():
        counts["dropped_unlabelled"] += 1
        return []
    counts["cut"] += long
    return [row]


def _none_left(paths: tuple[str, ...], counts: Counter[str], limit: int) -> str:
    long, unlabelled = counts["dropped_long"], counts["dropped_unlabelled"]
    return (
        f"{', '.join(paths)}: no row is left to train on: {long:,} are longer than "
        f"data.max_length={limit}, and {unlabelled:,} have nothing to learn within it; raise "
        "data.max_length"
    )


def _report(rows: Rows, sources: tuple[Source, ...], counts: Counter[str], limit: int) -> Report:
    lengths = rows.lengths
    return Report(
        sources=sources,
        max_length=limit,
        read=sum(source.records for source in sources),
        kept=len(rows),
        cut=counts["cut"],
        split=counts["split"],
        pieces=counts["pieces"],
        dropped_long=counts["dropped_long"],
        dropped_unlabelled=counts["dropped_unlabelled"],
        tokens=int(lengths.sum()),
        trained_tokens=int(rows.trained.sum()),
        lengths=(int(lengths.min()), round(float(np.median(lengths))), int(lengths.max())),
    )
