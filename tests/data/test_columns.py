"""Columns of other names."""

from __future__ import annotations

import re

import pytest
from data_fixtures import CHATML, make_tokenizer, write_jsonl

from droplora_jax.core.errors import InputError
from droplora_jax.data.columns import recognised, renamed
from droplora_jax.data.config import DataConfig
from droplora_jax.data.load import load


def text_of(tmp_path, record, **config):
    tokenizer = make_tokenizer(chat_template=CHATML)
    path = write_jsonl(tmp_path / "a.jsonl", [record])
    (row,), report = load(path, tokenizer, DataConfig(path, **config))
    return report.sources[0].format, tokenizer.decode(row.ids, skip_special_tokens=True)


@pytest.mark.parametrize(
    ("record", "columns", "format", "text"),
    [
        ({"q": "Q", "a": "A"}, {"prompt": "q", "completion": "a"}, "prompt_completion", "QA"),
        # The columns' own names win over keys of the same name, and may change places.
        (
            {"prompt": "A", "completion": "Q"},
            {"prompt": "completion", "completion": "prompt"},
            "prompt_completion",
            "QA",
        ),
        (
            {"prompt": "Q", "canonical_solution": "A"},
            {"completion": "canonical_solution"},
            "prompt_completion",
            "QA",
        ),
        (
            {"text": "whole", "q": "Q", "a": "A"},
            {"prompt": "q", "completion": "a"},
            "prompt_completion",
            "QA",
        ),
        ({"instruction": "Q", "output": "x", "body": "A"}, {"text": "body"}, "text", "A"),
    ],
)
def test_columns(tmp_path, record, columns, format, text):
    assert text_of(tmp_path, record, columns=columns) == (format, text)


def test_a_query_and_an_answer(tmp_path):
    record = {"query": "2 + 2?", "response": "4", "type": "x"}
    columns = {"instruction": "query", "output": "response"}
    format, text = text_of(tmp_path, record, columns=columns, template="alpaca_steps")
    assert format == "alpaca"
    assert text.endswith("### Instruction:\n2 + 2?\n\n### Response: Let's think step by step.4")


def test_an_optional_column_may_be_missing_and_no_other_is_read_for_it():
    columns = {"input": "context"}
    assert renamed({"instruction": "a", "context": "c"}, columns)["input"] == "c"
    assert "input" not in renamed({"instruction": "a", "input": "no"}, columns)


def test_roles_under_another_key(tmp_path):
    turns = [{"role": "user", "content": "a"}, {"role": "assistant", "content": "b"}]
    config = {"columns": {"messages": "conversations"}}
    assert text_of(tmp_path, {"conversations": turns}, **config)[0] == "messages"


def test_a_column_that_is_not_there(tmp_path):
    good = {"q": "Q", "a": "A"}
    path = write_jsonl(tmp_path / "a.jsonl", [good, {"q": "Q"}])
    config = DataConfig(path, columns={"prompt": "q", "completion": "a"})
    message = (
        "a.jsonl:2: completion is missing; the format prompt_completion has the keys prompt, "
        "completion; data.columns reads prompt from q, completion from a"
    )
    with pytest.raises(InputError, match=re.escape(message)):
        load(path, make_tokenizer(), config)


def test_a_file_without_any_of_the_columns():
    with pytest.raises(InputError, match=r"no format has the keys x, .*; data\.columns reads text"):
        recognised({"x": 1, "prompt": "a", "completion": "b"}, {"text": "body"})
