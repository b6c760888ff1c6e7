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
        "completion, optional system, optional history, optional tools; data.columns reads prompt "
        "from q, completion from a"
    )
    with pytest.raises(InputError, match=re.escape(message)):
        load(path, make_tokenizer(), config)


def test_a_file_without_any_of_the_columns():
    with pytest.raises(InputError, match=r"no format has the keys x, .*; data\.columns reads text"):
        recognised({"x": 1, "prompt": "a", "completion": "b"}, {"text": "body"})


def test_keys_that_are_ignored(tmp_path):
    """In rows and in messages, whatever they would mean."""
    record = {"prompt": "Q", "completion": "A", "history": "none", "images": ["a.png"]}
    text = text_of(tmp_path, record, ignore_keys=("history", "images"))
    assert text == ("prompt_completion", "QA")
    turns = [{"role": "user", "content": "a"}, {"role": "assistant", "content": "b", "loss": 0.5}]
    ignored = text_of(tmp_path, {"messages": turns}, ignore_keys=("loss",))
    del turns[1]["loss"]
    assert ignored == text_of(tmp_path, {"messages": turns})


def test_renamed_keys_are_those_of_a_dictionary():
    record = {"q": 1, "text": 2, "input": 3}
    columns = {"prompt": "q", "input": "context", "text": "input"}
    assert dict(renamed(record, columns)) == {"prompt": 1, "text": 3, "q": 1}
    assert len(renamed(record, columns, ("prompt",))) == 2


def test_the_overrides_that_errors_name_are_taken(tmp_path):
    turns = [{"role": "user", "content": "a"}, {"role": "assistant", "content": "b"}]
    for keys in ({"functions": [{"name": "f"}]}, {"system_prompt": "S"}):
        path = write_jsonl(tmp_path / "a.jsonl", [{"messages": turns, **keys}])
        tokenizer = make_tokenizer(chat_template="{{ tools }}" + CHATML)
        with pytest.raises(InputError) as info:
            load(path, tokenizer, DataConfig(path))
        (named,) = re.findall(r"data\.columns=\{(\w+): (\w+)\}", str(info.value))
        load(path, tokenizer, DataConfig(path, columns=dict([named])))


def test_a_value_that_is_not_read_is_not_looked_at():
    class Odd(dict):
        def __getitem__(self, key):
            assert key == "q"
            return super().__getitem__(key)

    record = Odd(q="Q", a="A", at=None)
    assert recognised(record, {"prompt": "q", "completion": "a"}) == "prompt_completion"
    assert renamed(record, {"prompt": "q"}, ("a",))["prompt"] == "Q"


def test_the_keys_that_an_error_lists_are_few():
    with pytest.raises(InputError, match=r"no format has the keys 0, .*, 19 and 980 more; "):
        recognised({str(i): i for i in range(1000)}, {})
