"""From files to batches.

    rows, report = load("train.json", tokenizer, config)     # loading.py: files, formats, templates
    batches = Batches(rows, rows_per_batch=128, seed=0, shuffle=True, max_length=1024)
    batches[n]                                               # batches.py: a function of n alone
    placed(batches, batches.lines(n), mesh)                  # placing.py: on a mesh
    fed(batches, batches.numbers, mesh, start=n)             # feeding.py: all from n, made ahead

A place (`places.py`) is one file or several, whose records are read one by one (`files.py`,
`readers/`, a file for each kind). A record becomes an `Example` (`formats/`, one file each), a
template (`templates/`) writes it out as a `Document`, pieces of text that are trained on or not,
and `encode.py` turns that into a `Row` of token ids. Rows are kept on disk (`flat.py`, `cache.py`)
and put into lines (`packing.py`), lines into batches, of several sources by weight (`mixing.py`).
"""

from droplora_jax.data.batches import Batch, Batches
from droplora_jax.data.config import DataConfig, Part
from droplora_jax.data.feeding import fed
from droplora_jax.data.formats import FORMATS, Example, Format, Turn
from droplora_jax.data.loading import load
from droplora_jax.data.mixing import held_out
from droplora_jax.data.placing import placed
from droplora_jax.data.report import Report, Source
from droplora_jax.data.rows import Flat, Row, Rows
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
    "Flat",
    "Format",
    "Part",
    "Piece",
    "Report",
    "Row",
    "Rows",
    "Source",
    "Turn",
    "fed",
    "held_out",
    "load",
    "placed",
    "preview",
]
