"""From the files of sources to tokenised rows."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Sequence
from functools import partial
from itertools import chain

from droplora_jax.core.errors import InputError
from droplora_jax.data.bad_rows import MOST, BadRow, bad_rows_error
from droplora_jax.data.cache import Cache
from droplora_jax.data.config import DataConfig, Place, parts_of
from droplora_jax.data.data_file import File
from droplora_jax.data.documents import Writer
from droplora_jax.data.end_markers import markers_of
from droplora_jax.data.formats.base import Empty
from droplora_jax.data.length_limit import Tally, drop_bad, drop_empty, fit
from droplora_jax.data.readers.base import Read
from droplora_jax.data.record import Fields
from droplora_jax.data.report import Report, Source
from droplora_jax.data.row_store import Flat, FlatWriter
from droplora_jax.data.rows import Rows
from droplora_jax.data.sources import files_of
from droplora_jax.data.templates.base import Document, Tokenizer
from droplora_jax.data.tokenization import encode

# The most that is tokenised in one call, which is several times faster than one record at a time.
_RECORDS, _CHARACTERS = 1024, 2**21

Placed = tuple[str, Document]  # the place of a record, for errors, and its document


def load(
    paths: Place | Sequence[Place], tokenizer: Tokenizer, config: DataConfig
) -> tuple[Rows, Report]:
    """Reads, renders, tokenises and shortens the examples of one source or several.

    The rows are arrays on disk, in the cache, and are used again by later calls.

    Args:
      paths: files, folders, globs or URLs, such as `config.train` or `config.valid`; each entry is
        one source of the `Rows`.
      tokenizer: a Hugging Face tokenizer.
      config: how records are read, rendered and shortened; its `train` and `valid` are not read.

    Returns:
      The rows, and a report of what was read, cut, split and dropped.

    Raises:
      InputError: a file is not as it should be, or records are not and `bad_rows` is `error` (names
        the file, the lines and the rule), or no row is left.
    """
    cache = Cache.of(config, tokenizer)
    groups: list[list[Flat]] = []
    sources: list[Source] = []
    total = Tally()
    for part in parts_of(paths):
        part_config = part.settings(config)
        groups.append([])
        for file in files_of(part.path):
            sha256 = file.sha256()
            write = partial(_write, file, config=part_config, tokenizer=tokenizer)
            flat, info = cache.rows(file, sha256, part_config, write)
            tally = info.tally(file.name)
            groups[-1].append(flat)
            sources.append(Source(file.name, info.format, info.template, tally.read, sha256))
            total.add(tally)
    rows = Rows(groups)
    return rows, total.report(rows, tuple(sources), config.max_length)


def _write(file: File, flat: FlatWriter, *, config: DataConfig, tokenizer: Tokenizer) -> None:
    """Writes the rows of a file, a chunk of records at a time."""
    write, records = _writer(file, tokenizer, config)
    tally = Tally()
    for chunk in _chunks(_written(file.name, records, write, tally)):
        rows = encode([document for _, document in chunk], tokenizer, tally.counts)
        for _, document in chunk:
            tally.end_markers.update(markers_of(document, tokenizer))
            tally.counts["unprompted"] += not document.prompted
        flat.add(
            fit(row, where, document.split, config, tally)
            for (where, document), row in zip(chunk, rows, strict=True)
        )
    flat.finish(file.name, write.format, write.template, tally)


def _writer(file: File, tokenizer: Tokenizer, config: DataConfig) -> tuple[Writer, Iterator[Read]]:
    """The writer for a file, chosen by its first good record, and all of the file's records.

    Raises:
      InputError: no format has the keys of that record. Where bad rows are dropped, the following
        records are tried, too.
    """
    records = file.read()
    tried: list[Read] = []
    bad: list[BadRow] = []
    for where, record in records:
        tried.append((where, record))
        try:
            writer = Writer.of(where, _whole(record), tokenizer, config)
        except InputError as error:
            bad.append(BadRow(where, error))
            fatal = config.bad_rows == "error" and not isinstance(record, InputError)
            if fatal or len(bad) == MOST:
                break
        else:
            return writer, chain(tried, records)
    raise bad_rows_error(file.name, bad, all_read=False, others=False)


def _whole(record: Fields | InputError) -> Fields:
    if isinstance(record, InputError):
        raise record
    return record


def _written(name: str, records: Iterable[Read], write: Writer, tally: Tally) -> Iterator[Placed]:
    """The documents of the records, without empty ones, and without bad ones if they are dropped.

    Raises:
      InputError: some are bad and are not dropped; names all that are, or the first `MOST`.
    """
    bad: list[BadRow] = []
    good = 0
    for where, record in records:
        try:
            document = write(where, _whole(record))
        except Empty as error:
            drop_empty(where, error, write.config, tally)
        except InputError as error:
            if write.config.bad_rows == "drop":
                drop_bad(error, tally)
                continue
            bad.append(BadRow(where, error))
            if len(bad) == MOST:
                break
        else:
            good += 1
            if not bad:
                yield where, document
    if bad:
        raise bad_rows_error(name, bad, all_read=len(bad) < MOST, others=good > 0)


def _chunks(documents: Iterable[Placed]) -> Iterator[list[Placed]]:
    chunk: list[Placed] = []
    characters = 0
    for where, document in documents:
        chunk.append((where, document))
        characters += sum(len(piece.text) for piece in document.pieces)
        if len(chunk) == _RECORDS or characters >= _CHARACTERS:
            yield chunk
            chunk, characters = [], 0
    if chunk:
        yield chunk
