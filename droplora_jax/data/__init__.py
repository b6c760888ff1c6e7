"""From files to batches.

    rows, report = load("train.json", tokenizer, config)     # load.py: files, formats, templates
    batches = Batches(rows, batch_size=128, seed=0, shuffle=True, max_length=1024)
    batches[n]                                               # batches.py: a function of n alone
    placed(batches, batches.lines(n), mesh)                  # device_feed.py: on a mesh
    fed(batches, batches.numbers, mesh, start=n)             # the same for all from n, made ahead

A source (`sources.py`) is one file or several, whose records are read one by one (`data_file.py`,
`readers/`, a file for each kind). A record becomes an `Example` (`formats/`, one file each), a
template (`templates/`) writes it out as a `Document`, pieces of text that are trained on or not,
and `tokenization.py` turns that into a `Row` of token ids. Rows are kept on disk (`row_store.py`,
`cache.py`) and put into packed sequences (`packing.py`), these into batches, of several sources by
weight (`mixing.py`).
"""
