"""The kinds of data files by the endings of their names, one module for each."""

from droplora_jax.data.readers.arrow import ARROW
from droplora_jax.data.readers.base import Reader
from droplora_jax.data.readers.json_lines import JSON_LINES
from droplora_jax.data.readers.json_list import JSON_LIST
from droplora_jax.data.readers.parquet import PARQUET
from droplora_jax.data.readers.table import CSV, TSV

READERS: dict[str, Reader] = {
    ".jsonl": JSON_LINES,
    ".ndjson": JSON_LINES,
    ".json": JSON_LIST,
    ".csv": CSV,
    ".tsv": TSV,
    ".parquet": PARQUET,
    ".arrow": ARROW,
}
