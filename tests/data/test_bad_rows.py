"""Rows that are not as they should be: listed in one error, or dropped, counted and named."""

from __future__ import annotations

import json

import pytest
from data_fixtures import CHATML, PAIR, make_tokenizer, write_json

from droplora_jax.core.errors import InputError
from droplora_jax.data.bad_rows import MOST
from droplora_jax.data.config import DataConfig, Part
from droplora_jax.data.load import load
from droplora_jax.data.report import Report


def user(content):
    return {"role": "user", "content": content}


def answer(content, **keys):
    return {"role": "assistant", "content": content, **keys}


GOOD = {"messages": [user("Q"), answer("A")]}
CALL = {"type": "function", "function": {"name": "now", "arguments": "[]"}}
BAD = {
    "the first message is the assistant's": [answer("Welcome!"), user("Q"), answer("A")],
    "no message of the assistant": [user("Is anyone there?")],
    "content must be text, is {'time': 12}": [user("Q"), answer("A"), user({"time": 12})],
    "the arguments of now must be an object": [user("Q"), answer("", tool_calls=[CALL])],
    "part 1 must be text, is 'image_url'": [user([{"type": "image_url"}]), answer("A")],
    "role='model': must be one of": [user("Q"), {"role": "model", "content": "A"}],
    "half of a surrogate pair": [user("Q \ud83d"), answer("A")],
    "images=['a.png']: only text is trained": [user("Q"), answer("A", images=["a.png"])],
}


def lines_of(rows: list) -> str:
    return "".join((row if isinstance(row, str) else json.dumps(row)) + "\n" for row in rows)


def dropped(path, **config) -> Report:
    tokenizer = make_tokenizer(chat_template=CHATML)
    return load(path, tokenizer, DataConfig(str(path), bad_rows="drop", **config))[1]


def test_each_kind_of_bad_row_is_dropped_counted_and_named(tmp_path):
    bad = [{"messages": turns} for turns in BAD.values()]
    path = tmp_path / "a.jsonl"
    path.write_text(lines_of([GOOD, *bad, '{"messages": ', "7", GOOD]))
    for _ in range(2):  # the second time from the cache
        report = dropped(path)
        assert (report.kept, report.read, report.dropped_bad) == (2, len(bad) + 4, len(bad) + 2)
        assert report.dropped == report.dropped_bad
        for line, (problem, reason) in enumerate(zip(report.bad, BAD, strict=False), 2):
            assert problem.startswith(f"{path}:{line}: ")
            assert reason in problem
        assert "broken JSON" in report.bad[-2]
        assert f"{len(report.bad)} dropped ({len(report.bad)} not as they should be)" in "\n".join(
            report.lines()
        )
        named = [problem.removeprefix(f"{tmp_path}/") for problem in report.bad]
        assert [f"left out: {problem}" for problem in named] == report.lines()[2:12]


def test_all_bad_rows_are_one_error_with_a_line_for_each_kind(tmp_path):
    path = tmp_path / "a.jsonl"
    numbers = [{"prompt": "Q", "completion": i} for i in range(8)]
    path.write_text(lines_of([PAIR, *numbers, PAIR, "7", {"prompt": "Q"}, numbers[0]]))
    with pytest.raises(InputError) as info:
        load(path, make_tokenizer(), DataConfig(str(path)))
    text, missing, key, hint = info.value.problems
    assert text.startswith(f"{path}:2: completion must be text, is 0; ")
    assert text.endswith(" (and so 3, 4, 5, 6, 7 and 3 more)")
    assert missing == f"{path}:11: must be an object with keys, is 7"
    assert key.startswith(f"{path}:12: completion is missing; ")
    assert hint == "data.bad_rows=drop leaves such rows out (11 rows) and names them"


def test_reading_stops_after_many_bad_rows(tmp_path):
    path = tmp_path / "a.jsonl"
    path.write_text(lines_of([PAIR, *[{"prompt": "Q"}] * (MOST + 5), "7"]))
    with pytest.raises(InputError) as info:
        load(path, make_tokenizer(), DataConfig(str(path)))
    first, hint = info.value.problems
    assert first.endswith(f"and so 3, 4, 5, 6, 7 and {MOST - 6} more)")
    assert hint == f"data.bad_rows=drop leaves such rows out ({MOST} rows so far) and names them"


def test_a_file_of_nothing_but_bad_rows(tmp_path):
    path = tmp_path / "a.jsonl"
    path.write_text(lines_of([{"prompt": "Q", "completion": 3}] * 2))
    with pytest.raises(InputError, match=r"a.jsonl:1: completion must be text, is 3.*so 2\)$"):
        load(path, make_tokenizer(), DataConfig(str(path)))
    with pytest.raises(
        InputError, match=r"no row is left.*: 2 are not as they should be \(.*a\.jso"
    ):
        dropped(path)


def test_a_first_row_of_no_format_is_a_bad_row_too(tmp_path):
    path = tmp_path / "a.jsonl"
    path.write_text(lines_of(["{", {"error": "timeout"}, PAIR]))
    report = dropped(path)
    assert (report.kept, report.dropped_bad, report.sources[0].format) == (
        1,
        2,
        "prompt_completion",
    )
    with pytest.raises(InputError, match=r"a\.jsonl:2: no format has the keys error"):
        load(path, make_tokenizer(), DataConfig(str(path)))
    path.write_text(lines_of([{"error": "timeout"}] * 3))
    with pytest.raises(InputError, match=r"a\.jsonl:1: no format has the keys error"):
        dropped(path)


def test_bad_rows_of_several_files(tmp_path):
    """The places are those of the files, which may be read as parts of their own."""
    paths = [tmp_path / f"{i}.jsonl" for i in range(3)]
    for i, path in enumerate(paths):
        path.write_text(lines_of([PAIR, *[{"prompt": str(i)}] * 10 * i]))
    parts = (str(paths[0]), Part(str(paths[1]), format="prompt_completion"), str(paths[2]))
    report = load(parts, make_tokenizer(), DataConfig(parts, bad_rows="drop"))[1]
    assert (report.kept, report.dropped_bad, len(report.bad)) == (3, 30, 20)
    assert report.bad[10].startswith(f"{paths[2]}:2: ")
    assert "left out: 10 more rows" in report.lines()


def test_empty_rows_are_not_bad_rows(tmp_path):
    empty = {"prompt": "Q", "completion": ""}
    path = write_json(tmp_path / "a.json", [PAIR, empty])
    report = dropped(path)
    assert (report.dropped_empty, report.dropped_bad) == (1, 0)
    with pytest.raises(InputError, match="completion is empty"):
        dropped(path, empty="error")


def test_a_file_that_is_broken_off_is_an_error_all_the_same(tmp_path):
    path = tmp_path / "a.json"
    path.write_text(json.dumps([PAIR, PAIR])[:-5])
    with pytest.raises(InputError, match=r"a\.json:1: broken JSON"):
        dropped(path)
