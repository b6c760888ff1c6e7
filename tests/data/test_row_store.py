"""Rows as files, written in chunks and mapped into memory."""

from __future__ import annotations

import numpy as np
from data_fixtures import assert_rows_equal, random_rows

from droplora_jax.data import row_store
from droplora_jax.data.rows import Flat, Rows


def test_a_writer_and_its_reader(tmp_path):
    from contextlib import ExitStack

    from droplora_jax.data.length_limit import Tally

    rows = random_rows(30, 9, seed=0)
    with ExitStack() as stack:
        writer = row_store.FlatWriter(tmp_path, stack)
        for start in range(0, 30, 7):
            writer.add([row] for row in rows[start : start + 7])
        writer.finish("a", "text", "none", Tally())
    found = row_store.read(tmp_path)
    assert found is not None
    assert_rows_equal(Rows([[found[0]]]), rows)
    np.testing.assert_array_equal(found[0].keys, Flat.of([row] for row in rows).keys)
    assert found[1].rows == 30
    assert row_store.read(tmp_path / "nowhere") is None
