"""From files to batches.

    rows, report = load("train.json", tokenizer, config)     # loading.py: files, formats, templates
    batches = Batches(rows, rows_per_batch=128, seed=0, shuffle=True, max_length=1024)
    batches[n]                                               # batches.py: a function of n alone
    placed(batches, batches.lines(n), mesh)                  # placing.py: on a mesh

A record of a file becomes an `Example` (`formats/`, one file each), a template (`templates/`)
writes it out as a `Document`, pieces of text that are trained on or not, and `encode.py` turns
that into a `Row` of token ids. Rows are put into lines (`packing.py`), lines into batches.
"""

from droplora_jax.data.batches import Batch, Batches
from droplora_jax.data.config import DataConfig
from droplora_jax.data.formats import FORMATS, Example, Format, Turn
from droplora_jax.data.loading import load
from droplora_jax.data.placing import placed
from droplora_jax.data.report import Report, Source
from droplora_jax.data.rows import Row, Rows
from droplora_jax.data.spans import preview
from droplora_jax.data.templates import TEMPLATES, Document, Piece

__all__ = [
    "FORMATS",
    "TEMPLATES",
    "Batch",
    "Batches",
    "DataConfig",
    "Document",
    "Example",
    "Format",
    "Piece",
    "Report",
    "Row",
    "Rows",
    "Source",
    "Turn",
    "load",
    "placed",
    "preview",
]
