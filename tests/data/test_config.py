"""Options that can not be, all named at once."""

from __future__ import annotations

import re

import pytest

from droplora_jax.core.errors import InputError
from droplora_jax.data.config import DataConfig, Part


@pytest.mark.parametrize(
    ("values", "message"),
    [
        ({"max_length": 1}, "max_length=1: must be at least 2"),
        ({"train": ""}, "train='': must be a file"),
        ({"train": ()}, "train=(): must be a file"),
        ({"valid": ("a.json", "")}, "valid=('a.json', ''): must be a file"),
        ({"format": "alpca"}, "format='alpca': must be one of auto, messages, sharegpt, "),
        ({"template": "alpacca"}, "did you mean alpaca?"),
        ({"train": (Part("a", weight=0.0),)}, "the weights [0.0] must be positive"),
        ({"train": (Part("a", weight=1.0), "b")}, "b has no weight, and others have"),
        ({"valid": (Part("a", weight=1.0),)}, "valid takes no weights"),
        ({"train": (Part("a", format="x"),)}, "train: a: format='x': must be one of"),
        ({"train": (Part("a", columns={"x": "y"}),)}, "train: a: columns.x='y': no format reads"),
        ({"valid_fraction": 1.0}, "valid_fraction=1.0: must be above 0 and below 1"),
        ({"valid_fraction": 0.1, "valid": "b"}, "valid and valid_fraction are both"),
        ({"too_long": "skip"}, "too_long='skip': must be one of cut, drop, error"),
        ({"empty": "keep"}, "empty='keep': must be one of drop, error"),
        ({"bad_rows": "keep"}, "bad_rows='keep': must be one of error, drop"),
        ({"train_on": "prompt"}, "train_on='prompt': must be one of responses, last, all"),
        (
            {"columns": {"instrction": "q"}},
            "columns.instrction='q': no format reads this key; there are messages, ",
        ),
        (
            {"format": "alpaca", "columns": {"prompt": "q"}},
            "columns.prompt='q': the format alpaca does not read this key; there are "
            "instruction, output, input",
        ),
        (
            {"columns": {"prompt": "q", "answer": "a"}},
            "columns: no format reads all of prompt, answer",
        ),
    ],
)
def test_a_configuration_that_can_not_be(values, message):
    with pytest.raises(InputError, match=re.escape(message)):
        DataConfig(**{"train": "a.json", **values})


def test_all_that_is_wrong_with_a_configuration_is_told_at_once():
    with pytest.raises(InputError) as caught:
        DataConfig(
            train=(Part("a", format="text"), "b"), max_length=0, empty="keep", columns={"x": "y"}
        )
    assert [problem.partition("=")[0] for problem in caught.value.problems] == [
        "train: a: columns.x",
        "max_length",
        "columns.x",
        "empty",
    ]
