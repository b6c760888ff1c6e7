"""Work in the background: its result and its errors come to who asks."""

from __future__ import annotations

import pytest

from droplora_jax.training.compiled_step import in_background


def test_the_result_and_the_error_come_to_who_asks():
    assert in_background(lambda: 7).result() == 7
    failed = in_background(lambda: {}["x"])
    with pytest.raises(KeyError, match="x"):
        failed.result()
