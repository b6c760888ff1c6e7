"""Files and formats: what is read, and what a person is told about what can't be."""

from __future__ import annotations

import gzip
import json
import re

import pytest
from data_fixtures import make_tokenizer, write_json, write_jsonl

from droplora_jax.core.errors import InputError
from droplora_jax.data.columns import recognised
from droplora_jax.data.config import DataConfig, Part
from droplora_jax.data.data_file import local
from droplora_jax.data.formats import FORMATS
from droplora_jax.data.formats.base import Example, Turn
from droplora_jax.data.formats.wrapped import TASK
from droplora_jax.data.load import load

ROW = {"instruction": "add", "input": "1 2", "output": "3"}


def read(path):
    return list(local(path).records())


def fails(path, config=None, *, match):
    config = config or DataConfig(train=str(path))
    with pytest.raises(InputError, match=match) as info:
        load(config.train, make_tokenizer(), config)
    assert str(path) in str(info.value)
    return str(info.value)


@pytest.mark.parametrize("packed", [False, True])
@pytest.mark.parametrize("mark", [b"", b"\xef\xbb\xbf"])
def test_json_and_json_lines_say_where_a_row_stands(tmp_path, packed, mark):
    rows = [{"text": "één"}, {"text": "a\u2028b"}]
    texts = {"a.json": json.dumps(rows, ensure_ascii=False, indent=1)}
    texts["a.jsonl"] = "\n\n".join(json.dumps(row, ensure_ascii=False) for row in rows) + "\r\n"
    where = {"a.json": ["{}, row 1", "{}, row 2"], "a.jsonl": ["{}:1", "{}:3"]}
    for name, text in texts.items():
        raw = mark + text.encode()
        path = tmp_path / (name + ".gz" if packed else name)
        path.write_bytes(gzip.compress(raw, mtime=0) if packed else raw)
        assert read(path) == [
            (place.format(path), row) for place, row in zip(where[name], rows, strict=True)
        ]


@pytest.mark.parametrize(
    ("name", "raw", "message"),
    [
        ("a.jsonl", b'{"text": "a"}\n{"text": ', r"a\.jsonl:2: broken JSON"),
        ("a.jsonl", b'[\n{"text": "a"}]', r"a\.jsonl:1: broken JSON.*goes into a \.json file"),
        ("a.jsonl", b'{"text": "a"}\n3\n', r"a\.jsonl:2: must be an object with keys, is 3"),
        ("a.json", b'[{"text": "a"},\n{"text" "b"}]', r"a\.json:2: broken JSON"),
        ("a.json", b'{"text": "a"}\n{"text": "b"}', r"a\.json:2: .* is named \.jsonl"),
        ("a.json", b'{"data": []}', "must be a list of objects, is an object"),
        ("a.json", b'[{"text": "a"}, null]', "row 2: must be an object with keys, is null"),
        ("a.json", b"[]", "the list is empty"),
        ("a.json", b"[" * 100_000, "broken JSON"),
        ("a.json", b"", "the file is empty"),
        ("a.jsonl", b" \n\n", "the file is empty"),
        ("a.jsonl", b'{"text": "a"}\n{"text": "\xe9"}', r"a\.jsonl:2: not UTF-8 \(byte 0xe9\)"),
        ("a.json.gz", b"[]", r"not a whole \.gz file"),
        ("a.json.gz", gzip.compress(b"[]" * 99, mtime=0)[:-9], r"not a whole \.gz file"),
        ("a.txt", b"text\na", r"a\.txt: must be one of \.jsonl, .*\.zst"),
        ("a.jsonl", b'{"text": "\\ud800"}', "a.jsonl:1: text holds half of a surrogate pair"),
    ],
)
def test_a_broken_file_is_named_with_its_line(tmp_path, name, raw, message):
    (tmp_path / name).write_bytes(raw)
    fails(tmp_path / name, match=message)


def test_a_missing_file_and_a_folder(tmp_path):
    fails(tmp_path / "none.json", match="no such file")
    (tmp_path / "folder.json").mkdir()
    fails(tmp_path / "folder.json", match="the folder holds no data file")


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


def test_several_files_each_of_its_own_format(tmp_path):
    paths = (
        write_json(tmp_path / "a.json", [ROW, ROW]),
        write_jsonl(tmp_path / "b.jsonl", [{"text": "plain"}]),
    )
    rows, report = load(paths, make_tokenizer(), DataConfig(train=paths))
    assert len(rows) == report.read == 3
    assert [(s.path, s.format, s.template, s.records) for s in report.sources] == [
        (paths[0], "alpaca", "alpaca", 2),
        (paths[1], "text", "none", 1),
    ]
    assert len({s.sha256 for s in report.sources}) == 2
    assert len(load(tmp_path / "a.json", make_tokenizer(), DataConfig(train="x"))[0]) == 2


def test_each_source_may_have_a_format_columns_and_a_template_of_its_own(tmp_path):
    paths = [write_json(tmp_path / f"{i}.json", [{"q": "a", "a": "b"}]) for i in range(2)]
    own = Part(paths[1], format="prompt_completion", columns={"prompt": "q", "completion": "a"})
    config = DataConfig(
        train=(
            write_json(tmp_path / "c.json", [ROW]),
            own,
            Part(paths[0], format="question_answer"),
        ),
        columns={},
    )
    with pytest.raises(InputError, match="question is missing"):
        load(config.train, make_tokenizer(), config)
    rows, report = load(config.train[:2], make_tokenizer(), config)
    assert [source.format for source in report.sources] == ["alpaca", "prompt_completion"]
    assert rows.counts == [1, 1]
    assert config.weights is None
    assert DataConfig(train=(Part("a", 2.0), Part("b", 1.0))).weights == (2.0, 1.0)


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
