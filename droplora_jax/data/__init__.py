"""From files to batches.

    rows, report = load("train.json", tokenizer, config)     # load.py: files, formats, templates
    batches = Batches(rows, batch_size=128, seed=0, shuffle=True, max_length=1024)
    batches[n]                                               # batches.py: a function of n alone
    feed(batches, batches.indices, mesh, start=n)            # device_feed.py: on a mesh, made ahead

A source (`sources.py`) is one file or several, whose records are read one by one (`data_file.py`
and `readers/`, with one module for each kind of file). A format (`formats/`) turns a record into an
`Example`. A template (`templates/`) writes the example out as a `Document`: pieces of text that are
trained on or not. `tokenization.py` turns the document into a `Row` of token ids, and
`length_limit.py` cuts, splits or drops it. Rows are kept on disk (`row_store.py`, `cache.py`).
`packing.py` puts them into sequences and `batches.py` these into batches, from several sources by
weight (`mixing.py`).
"""
