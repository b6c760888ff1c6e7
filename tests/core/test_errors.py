from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass

import pytest

from droplora_jax.core.errors import InputError, did_you_mean, first_line, raise_all


@dataclass(frozen=True)
class Pair:
    low: int
    high: int

    def __post_init__(self) -> None:
        raise_all(self._problems())

    def _problems(self) -> Iterator[str]:
        if self.low < 0:
            yield f"low={self.low}: must be at least 0"
        if self.high < self.low:
            yield f"high={self.high}: must be at least low={self.low}"


def test_a_dataclass_tells_all_that_is_wrong_with_it_at_once():
    with pytest.raises(InputError) as caught:
        Pair(-1, -2)
    assert caught.value.problems == (
        "low=-1: must be at least 0",
        "high=-2: must be at least low=-1",
    )
    assert str(caught.value) == "\n".join(caught.value.problems)
    assert Pair(1, 2) == Pair(1, 2)


def test_a_reader_adds_the_section_to_each_problem():
    error = InputError("low=1: too low", "high is missing").within("pair")
    assert error.problems == ("pair.low=1: too low", "pair.high is missing")
    assert error.within("").problems == error.problems


def test_an_error_without_text_has_a_first_line_too():
    assert first_line(OSError("\n no space \nleft")) == "no space"
    assert first_line(OSError()) == "OSError"


def test_the_nearest_name_is_asked_after():
    assert did_you_mean("alpca", ["auto", "alpaca"]) == "did you mean alpaca?"
    assert did_you_mean("x", iter(["auto", "alpaca"])) == ""
