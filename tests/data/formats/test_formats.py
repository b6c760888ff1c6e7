"""Formats: which record is of which, and what a person is told about a record that does not fit."""

from __future__ import annotations

import pytest
from data_fixtures import ROW, fails, make_tokenizer, write_json, write_jsonl

from droplora_jax.core.errors import InputError
from droplora_jax.data.columns import recognised
from droplora_jax.data.config import DataConfig
from droplora_jax.data.formats import FORMATS
from droplora_jax.data.formats.base import Example, Turn
from droplora_jax.data.formats.wrapped import TASK
from droplora_jax.data.load import load

EXAMPLES = {
    "alpaca": (ROW, Example((Turn("user", "add"), Turn("assistant", "3")), input="1 2")),
    "prompt_completion": (
        {"prompt": "", "completion": " x"},
        Example((Turn("user", ""), Turn("assistant", " x"))),
    ),
    "messages": (
        {"messages": [{"role": "user", "content": "a"}, {"role": "assistant", "content": "b"}]},
        Example((Turn("user", "a"), Turn("assistant", "b"))),
    ),
    "text": ({"text": " a "}, Example(text=" a ")),
    "sharegpt": (
        {"conversations": [{"from": "human", "value": "a"}, {"from": "gpt", "value": "b"}]},
        Example((Turn("user", "a"), Turn("assistant", "b"))),
    ),
    "question_answer": (
        {"question": "a", "answer": "b"},
        Example((Turn("user", "a"), Turn("assistant", "b"))),
    ),
    "wrapped": (
        {"instruction": f"{TASK}. ### Response:", "input": "", "output": "b"},
        Example((Turn("user", f"{TASK}. ### Response:"), Turn("assistant", "b"))),
    ),
}


@pytest.mark.parametrize("name", FORMATS)
def test_a_format_knows_its_own_records(name):
    record, example = EXAMPLES[name]
    record = {**record, "extra": 1}
    assert recognised(record, {}) == name
    assert FORMATS[name].convert(record) == example
    for key in FORMATS[name].required:
        without = {k: v for k, v in record.items() if k != key}
        if name != "wrapped":
            assert not FORMATS[name].matches(without)
        with pytest.raises(InputError, match=key):
            FORMATS[name].convert(without)


def test_null_is_no_input():
    assert FORMATS["alpaca"].convert({**ROW, "input": None}).input == ""


def test_the_telling_keys_win_over_text(tmp_path):
    path = write_json(tmp_path / "a.json", [{**ROW, "text": "all of it"}])
    _, report = load(path, make_tokenizer(), DataConfig(train=path))
    assert report.sources[0].format == "alpaca"


@pytest.mark.parametrize(
    ("row", "message"),
    [
        ({"instruction": "a", "input": ""}, "output is missing"),
        ({**ROW, "output": 3}, "output must be text, is 3"),
        ({**ROW, "input": ["a"]}, r"input must be text, is \['a'\]"),
    ],
)
def test_a_row_that_does_not_fit_is_named_with_the_keys_expected(tmp_path, row, message):
    path = write_jsonl(tmp_path / "a.jsonl", [ROW, row])
    text = fails(path, match=rf"a\.jsonl:2: {message}")
    assert text.endswith("the format alpaca has the keys instruction, output, optional input")


@pytest.mark.parametrize(
    ("messages", "message"),
    [
        ("hello", "must be a list of objects"),
        ([], "must be a list of objects"),
        ([{"role": "user", "content": "a"}], "no message of the assistant"),
        (["a"], "message 1 must be an object"),
        ([{"content": "a"}], "message 1: role is missing"),
    ],
)
def test_messages_that_do_not_fit(tmp_path, messages, message):
    path = write_json(tmp_path / "a.json", [{"messages": messages}])
    fails(path, match=rf"row 1: .*{message}.*format messages has the keys messages")


def test_keys_of_no_format_list_the_formats(tmp_path):
    path = write_json(tmp_path / "a.json", [{"q": "a", "a": "b"}])
    text = fails(path, match="row 1: no format has the keys q, a; ")
    assert all(name in text for name in FORMATS)


def test_a_format_that_is_named_is_not_guessed(tmp_path):
    path = write_json(tmp_path / "a.json", [{**ROW, "text": "all of it"}])
    config = DataConfig(train=path, format="text")
    _, report = load(path, make_tokenizer(), config)
    assert report.sources[0].format == "text"
    fails(path, DataConfig(train=path, format="messages"), match="row 1: messages must be a list")
