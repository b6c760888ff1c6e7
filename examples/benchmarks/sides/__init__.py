"""One file a side: how each trains the same factors on the same weights with the same tokens.

`prepare` returns an object with `first`, one step on the first rows, and `run`, a turn through all
of them: forward, backward, clip to norm 1, AdamW. Both return a `work.Done`. Packages are imported
inside `prepare`, in the side's own process.
"""
