"""Formats: which record is of which, and what a person is told about a record that does not fit."""

from __future__ import annotations

import json

import pytest
from data_fixtures import CHATML, ROW, fails, make_tokenizer, write_json, write_jsonl

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
    "prompt_messages": (
        {
            "prompt": [
                {"role": "user", "content": "a"},
                {"role": "assistant", "content": "b"},
                {"role": "user", "content": "c"},
            ],
            "completion": [{"role": "assistant", "content": "d"}],
        },
        Example(
            (
                Turn("user", "a", learnt=False),
                Turn("assistant", "b", learnt=False),
                Turn("user", "c", learnt=False),
                Turn("assistant", "d"),
            )
        ),
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
        if name not in ("wrapped", "prompt_messages"):
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
    assert "the format alpaca has the keys instruction, output, optional input, " in text
    assert text.endswith("data.bad_rows=drop leaves such rows out (1 row) and names them")


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


# --- what stands before a question ----------------------------------------------------------------

BEFORE = {
    "system": "Be kind.",
    "history": [["Q1", "A1"], ["Q2", "A2"]],
    "tools": [{"name": "find", "parameters": {}}],
}
QUESTIONS = {
    "alpaca": ({"instruction": "Q", "output": "A", "input": "I"}, "Q\nI"),
    "prompt_completion": ({"prompt": "Q", "completion": "A"}, "Q"),
    "question_answer": ({"question": "Q", "answer": "A"}, "Q"),
    "wrapped": ({"instruction": f"{TASK}.", "output": "A"}, f"{TASK}."),
}


@pytest.mark.parametrize("cell", [False, True])
@pytest.mark.parametrize("name", QUESTIONS)
def test_system_history_and_tools_stand_before_the_question(name, cell):
    """Also where they are the JSON in the cell of a table."""
    record, question = QUESTIONS[name]
    before = {key: json.dumps(v) if cell and key != "system" else v for key, v in BEFORE.items()}
    example = FORMATS[name].example(record | before)
    said = [(turn.role, turn.content, turn.learnt) for turn in example.turns]
    assert said == [
        ("system", "Be kind.", True),
        ("user", "Q1", True),
        ("assistant", "A1", True),
        ("user", "Q2", True),
        ("assistant", "A2", True),
        ("user", question, True),
        ("assistant", "A", True),
    ]
    assert [tool["function"]["name"] for tool in example.tools] == ["find"]
    for nothing in ({"system": "", "history": [], "tools": []}, dict.fromkeys(BEFORE)):
        assert FORMATS[name].example(record | nothing) == FORMATS[name].convert(record)


@pytest.mark.parametrize("history", ["said before", [["Q"]], [["Q", ""]], [["Q", None]], [{}], [3]])
def test_a_history_of_another_form(history):
    record = QUESTIONS["alpaca"][0] | {"history": history}
    with pytest.raises(
        InputError, match=r"history: number 1 must be .*data\.ignore_keys=\[history"
    ):
        FORMATS["alpaca"].example(record)


def test_a_template_without_a_place_for_them_says_so(tmp_path):
    path = write_jsonl(tmp_path / "a.jsonl", [QUESTIONS["alpaca"][0] | {"system": "Be kind."}])
    fails(path, match=r"from system, user, assistant; data\.template=chat takes any")


# --- keys that mean something elsewhere -----------------------------------------------------------


@pytest.mark.parametrize(
    ("name", "keys", "message"),
    [
        ("alpaca", {"images": ["a.png"]}, r"images=\['a.png'\]: only text is trained here; data\."),
        ("alpaca", {"system_prompt": "Be kind."}, r"data\.columns=\{system: system_prompt\}"),
        ("messages", {"system_prompt": "Be kind."}, r"data\.columns=\{system: system_prompt\}"),
        (
            "messages",
            {"chat_template_kwargs": {"a": True}},
            r"data\.ignore_keys=\[chat_template_kw",
        ),
        ("sharegpt", {"videos": ["v"], "audios": ["a"]}, r"videos=.*; audios=.*"),
        ("messages", {"functions": [{"name": "f"}]}, r"data\.columns=\{tools: functions\}"),
        ("sharegpt", {"kto_tag": False}, r"kto_tag=False: the row's answer is .* not wanted"),
        ("prompt_completion", {"label": False}, r"label=False: the completion is .* not wanted"),
        ("prompt_messages", {"label": False}, r"label=False: the completion is .* not wanted"),
    ],
)
def test_a_key_with_a_meaning_that_is_not_served_is_refused(name, keys, message):
    record, _ = EXAMPLES[name]
    with pytest.raises(InputError, match=message):
        FORMATS[name].example(record | keys)


@pytest.mark.parametrize("name", FORMATS)
def test_other_keys_are_harmless(name):
    record, example = EXAMPLES[name]
    harmless = {
        "id": 7,
        "source": "x",
        "images": [],
        "videos": None,
        "audios": "",
        "kto_tag": True,
        "label": True,
        "system_prompt": None,
        "chosen": [{"role": "assistant", "content": "b"}],
        "chat_template_kwargs": {},
    }
    assert FORMATS[name].example(record | harmless) == example


def test_a_context_is_not_left_out(tmp_path):
    row = {"context": "Paris is in France.", "a": "Where is Paris?", "b": "In France."}
    path = write_jsonl(tmp_path / "a.jsonl", [row, {**row, "context": ""}])
    for columns in ({"instruction": "a", "output": "b"}, {"question": "a", "answer": "b"}):
        config = DataConfig(path, columns=columns)
        text = fails(
            path, config, match=r"context='Paris .* would be left out; set data\.columns=\{"
        )
        assert "input: context" in text
        load(path, make_tokenizer(), DataConfig(path, columns=columns, ignore_keys=("context",)))
    columns = {"instruction": "a", "input": "context", "output": "b"}
    tokenizer = make_tokenizer()
    rows, _ = load(path, tokenizer, DataConfig(path, columns=columns))
    assert "### Input:\nParis is in France.\n" in tokenizer.decode(rows[0].ids)
    assert "### Input:" not in tokenizer.decode(rows[1].ids)


def test_the_last_answer_of_a_pair_is_not_passed_over():
    pair = {key: {"from": "gpt", "value": key} for key in ("chosen", "rejected")}
    turns = EXAMPLES["sharegpt"][0]["conversations"]
    with pytest.raises(InputError, match="chosen: the last answer is one of a pair"):
        FORMATS["sharegpt"].example({"conversations": [*turns, turns[0]], **pair})


def test_prompt_and_completion_as_messages(tmp_path):
    record, _ = EXAMPLES["prompt_messages"]
    tokenizer = make_tokenizer(chat_template=CHATML)
    in_cells = {key: json.dumps(value) for key, value in record.items()}
    for rows in ([record], [in_cells]):
        path = write_jsonl(tmp_path / "a.jsonl", rows)
        (row,), report = load(path, tokenizer, DataConfig(path))
        assert report.sources[0].format == "prompt_messages"
        whole = record["prompt"] + record["completion"]
        assert tokenizer.decode(row.ids) == tokenizer.apply_chat_template(whole, tokenize=False)
        assert tokenizer.decode(row.ids[row.trained]) == "d<|end|>"
    with pytest.raises(InputError, match="no message of the assistant that is learnt"):
        FORMATS["prompt_messages"].example(record | {"completion": record["prompt"][:1]})


def test_a_prompt_that_looks_like_a_list_is_text():
    assert recognised({"prompt": "[1, 2]", "completion": "[3]"}, {}) == "prompt_completion"
