"""From text to rows: special tokens, what is learnt, the limit, the report and the preview."""

from __future__ import annotations

import itertools

import numpy as np
import pytest
from data_fixtures import BOS, CHATML, EOS, make_tokenizer, random_rows, write_json

from droplora_jax.core.errors import InputError
from droplora_jax.data.config import DataConfig
from droplora_jax.data.load import load
from droplora_jax.data.preview import preview
from droplora_jax.data.rows import Row, Rows, row
from droplora_jax.data.templates.base import Document, Piece
from droplora_jax.data.tokenization import encode

PROMPT, RESPONSE = "the answer: ", "is true 日本 🙂"
PAIR = {"prompt": PROMPT, "completion": RESPONSE}


def loaded(tmp_path, rows, tokenizer, **config):
    path = write_json(tmp_path / "a.json", rows)
    return load(path, tokenizer, DataConfig(train=path, **config))


def bare(tokenizer, text):
    return tokenizer(text, add_special_tokens=False)["input_ids"]


@pytest.mark.parametrize(("adds_bos", "adds_eos"), list(itertools.product([False, True], repeat=2)))
@pytest.mark.parametrize("pad", [None, EOS])
def test_a_row_is_prompt_response_and_a_learnt_eos(tmp_path, adds_bos, adds_eos, pad):
    tokenizer = make_tokenizer(adds_bos=adds_bos, adds_eos=adds_eos, pad=pad)
    (got,), _ = loaded(tmp_path, [PAIR], tokenizer)
    prompt = tokenizer(PROMPT)["input_ids"]
    prompt = prompt[:-1] if adds_eos else prompt
    response = [*bare(tokenizer, RESPONSE), tokenizer.eos_token_id]
    assert got.ids.tolist() == prompt + response
    assert got.trained.tolist() == [False] * len(prompt) + [True] * len(response)
    assert got.ids.dtype == np.int32


def test_an_eos_that_the_prompt_itself_ends_with_stays(tmp_path):
    tokenizer = make_tokenizer(adds_eos=True)
    (got,), _ = loaded(tmp_path, [{"prompt": "a" + EOS, "completion": "b"}], tokenizer)
    assert tokenizer.decode(got.ids) == f"{BOS}a{EOS}b{EOS}"


def test_without_bos_and_prompt_the_first_token_is_no_target(tmp_path):
    tokenizer = make_tokenizer(adds_bos=False)
    (got,), _ = loaded(tmp_path, [{"prompt": "", "completion": "ab"}], tokenizer)
    assert got.trained.tolist() == [False] + [True] * (len(got) - 1)


def test_pieces_are_tokenised_by_themselves():
    tokenizer = make_tokenizer()
    text = "the answer is"
    halves = (Piece(text[:5], False), Piece(text[5:], True))
    apart, whole = encode([Document(halves), Document(halves, add_special=False)], tokenizer)
    parts = bare(tokenizer, text[:5]), bare(tokenizer, text[5:])
    assert apart.ids[1:-1].tolist() == parts[0] + parts[1]
    assert apart.trained.tolist() == [False] * (1 + len(parts[0])) + [True] * (len(parts[1]) + 1)
    assert whole.ids.tolist() == bare(tokenizer, text) != parts[0] + parts[1]


@pytest.mark.parametrize("at", range(1, 12))
def test_a_token_that_reaches_into_a_trained_piece_is_trained(at):
    tokenizer = make_tokenizer()
    text = "the 日本🙂 is"
    document = Document((Piece(text[:at], False), Piece(text[at:], True)), add_special=False)
    (got,) = encode([document], tokenizer)
    places = tokenizer(text, add_special_tokens=False, return_offsets_mapping=True)
    assert got.trained[1:].tolist() == [end > at for _, end in places["offset_mapping"]][1:]


def test_what_is_trained_on():
    pieces = [("a", False), ("b", True), ("c", False), ("d", True), ("e", False)]
    document = Document(tuple(Piece(*piece) for piece in pieces))
    expected = {"responses": "bd", "last": "d", "all": "abcde"}
    for which, texts in expected.items():
        got = document.trained_on(which).pieces
        assert [piece.text for piece in got] == list("abcde")
        assert "".join(piece.text for piece in got if piece.trained) == texts


def test_a_whole_needs_a_tokenizer_that_knows_places():
    class Slow:
        is_fast = False

    with pytest.raises(InputError, match=r"needs a tokenizer\.json"):
        encode([Document((Piece("a", True),), add_special=False)], Slow())


def test_chat_adds_nothing_to_what_the_template_writes(tmp_path):
    tokenizer = make_tokenizer(adds_eos=True, eos=None, chat_template="{{ bos_token }}" + CHATML)
    messages = [{"role": "user", "content": "a"}, {"role": "assistant", "content": "b"}]
    (got,), _ = loaded(tmp_path, [{"messages": messages}], tokenizer)
    text = tokenizer.apply_chat_template(messages, tokenize=False)
    assert tokenizer.decode(got.ids) == text
    assert tokenizer.decode(got.ids[got.trained]) == "b<|end|>"


def test_a_tokenizer_without_eos_is_refused_where_one_is_needed(tmp_path):
    with pytest.raises(InputError, match="the tokenizer has no EOS token"):
        loaded(tmp_path, [PAIR], make_tokenizer(eos=None))


def test_special_tokens_must_stand_around_the_text():
    def tokenizer(texts, *, add_special_tokens, verbose):
        return {"input_ids": [[1, 9, 2] if add_special_tokens else [1, 2] for _ in texts]}

    with pytest.raises(InputError, match="must add them before or behind the text"):
        encode([Document((Piece("a", True),))], tokenizer)


def test_loading_does_not_depend_on_the_chunk(tmp_path, monkeypatch):
    tokenizer = make_tokenizer()
    data = [{"prompt": f"{i} the", "completion": "true" * (i % 5 + 1)} for i in range(20)]
    rows, report = loaded(tmp_path, data, tokenizer)
    monkeypatch.setattr("droplora_jax.data.load._RECORDS", 7)
    again, same = loaded(tmp_path, data, tokenizer)
    assert report == same
    for i, (one, other) in enumerate(zip(rows, again, strict=True)):
        assert tokenizer.decode(one.ids) == f"{BOS}{i} the{'true' * (i % 5 + 1)}{EOS}"
        np.testing.assert_array_equal(one.ids, other.ids)
        np.testing.assert_array_equal(one.trained, other.trained)


LONG = [
    {"prompt": "0 1 2", "completion": "3 4 5"},
    {"prompt": "0 1 2 3 4 5 6 7 8 9", "completion": "9 8 7 6 5 4 3 2 1 0"},
]


def test_too_long_is_cut(tmp_path):
    tokenizer = make_tokenizer()
    whole, _ = loaded(tmp_path, LONG, tokenizer)
    limit = len(whole[1]) - 3
    rows, report = loaded(tmp_path, LONG, tokenizer, max_length=limit)
    np.testing.assert_array_equal(rows[1].ids, whole[1].ids[:limit])
    np.testing.assert_array_equal(rows[1].trained, whole[1].trained[:limit])
    assert (report.read, report.kept, report.cut, report.dropped) == (2, 2, 1, 0)


def test_too_long_is_dropped(tmp_path):
    tokenizer = make_tokenizer()
    whole, _ = loaded(tmp_path, LONG, tokenizer)
    at_the_limit, report = loaded(tmp_path, LONG, tokenizer, max_length=len(whole[1]))
    assert (len(at_the_limit), report.cut) == (2, 0)
    config = {"max_length": len(whole[1]) - 1, "too_long": "drop"}
    rows, report = loaded(tmp_path, LONG, tokenizer, **config)
    assert (len(rows), report.cut, report.dropped_long) == (1, 0, 1)
    with pytest.raises(InputError, match=r"no row is left.*1 are longer than data\.max_length"):
        loaded(tmp_path, LONG[1:], tokenizer, **config)


def test_too_long_is_an_error(tmp_path):
    tokenizer = make_tokenizer()
    whole, _ = loaded(tmp_path, LONG, tokenizer)
    n = len(whole[1])
    with pytest.raises(InputError, match=rf"row 2: {n} tokens are .*max_length={n - 1}"):
        loaded(tmp_path, LONG, tokenizer, max_length=n - 1, too_long="error")
    assert len(loaded(tmp_path, LONG, tokenizer, max_length=n, too_long="error")[0]) == 2


def test_a_row_cut_within_its_prompt_is_dropped_and_counted(tmp_path):
    tokenizer = make_tokenizer()
    short = {"prompt": "0", "completion": "1"}
    rows, report = loaded(tmp_path, [*LONG, short], tokenizer, max_length=4)
    assert (len(rows), report.cut, report.dropped_unlabelled) == (1, 0, 2)
    with pytest.raises(InputError, match=r"no row is left.*2 have nothing to learn"):
        loaded(tmp_path, LONG, tokenizer, max_length=4)


@pytest.mark.parametrize("adds_bos", [False, True])
@pytest.mark.parametrize("limit", [2, 3, 7, 10, 1000])
def test_plain_text_is_split_and_every_token_predicted_once(tmp_path, adds_bos, limit):
    tokenizer = make_tokenizer(adds_bos=adds_bos)
    for text in ("0", "the answer is 日本 🙂 0 1 2 3 4 5 6 7 8 9"):
        (whole,), _ = loaded(tmp_path, [{"text": text}], tokenizer, max_length=10_000)
        assert tokenizer.decode(whole.ids) == (BOS if adds_bos else "") + text + EOS
        assert whole.trained.tolist() == [False] + [True] * (len(whole) - 1)
        pieces, report = loaded(tmp_path, [{"text": text}], tokenizer, max_length=limit)
        assert all(len(piece) <= limit for piece in pieces)
        targets = [piece.ids[piece.trained] for piece in pieces]
        np.testing.assert_array_equal(np.concatenate(targets), whole.ids[1:])
        for before, after in itertools.pairwise(pieces):
            assert len(before) == limit
            assert after.ids[0] == before.ids[-1]
        split = len(whole) > limit
        assert (report.split, report.pieces) == ((1, len(pieces)) if split else (0, 0))
        assert report.cut == report.dropped == 0


def test_empty_rows_are_dropped_counted_and_named(tmp_path):
    tokenizer = make_tokenizer()
    empty = {"prompt": "0", "completion": " \n"}
    rows, report = loaded(tmp_path, [empty, *LONG, *[empty] * 3], tokenizer)
    assert (len(rows), report.read, report.dropped, report.dropped_empty) == (2, 6, 4, 4)
    assert (
        "2 rows to train on; 0 cut to 1,024 tokens; 4 dropped (4 empty: a.json, row 1: completion, "
        "a.json, row 4: completion, a.json, row 5: completion, ...)"
    ) in report.lines()
    with pytest.raises(InputError, match=r"row 1: completion is empty: .* or set data.empty=drop"):
        loaded(tmp_path, [empty, *LONG], tokenizer, empty="error")
    with pytest.raises(InputError, match=r"no row is left.*1 are empty \(.*row 1: completion\)"):
        loaded(tmp_path, [empty], tokenizer)


def test_the_report(tmp_path):
    tokenizer = make_tokenizer()
    data = [*LONG, {"prompt": "0", "completion": "1"}]
    whole, _ = loaded(tmp_path, data, tokenizer)
    limit = len(whole[1]) - 1
    rows, report = loaded(tmp_path, data, tokenizer, max_length=limit)
    lengths = sorted(len(r) for r in whole)
    assert report.lengths == tuple((length, 1) for length in lengths)
    assert report.tokens == sum(len(r) for r in rows) == sum(lengths) - 1
    assert report.trained_tokens == sum(int(r.trained.sum()) for r in rows)
    first, changes, trained, sizes = report.lines()
    assert first == f"3 rows from {tmp_path / 'a.json'} (prompt_completion, template none)"
    assert changes == f"3 rows to train on; 1 cut to {limit} tokens; 0 dropped"
    share = report.trained_tokens / report.tokens
    assert trained == f"{share:.0%} of {report.tokens} tokens are trained"
    low, middle, high = lengths
    assert sizes == (
        f"lengths in tokens: {low} / {middle} / {high} / {high} / {high} "
        f"(min / 50% / 90% / 99% / max), 1 above max_length={limit}"
    )
    _, report = loaded(tmp_path, data, tokenizer, max_length=limit, too_long="drop")
    assert f"1 dropped (1 of more than {limit} tokens)" in report.lines()[1]
    _, report = loaded(tmp_path, [{"text": "0123456789"}], tokenizer, max_length=4)
    assert f"1 split into {report.pieces} of at most 4 tokens;" in report.lines()[1]


def test_the_report_of_many_files_shows_a_few(tmp_path):
    tokenizer = make_tokenizer()
    paths = [write_json(tmp_path / f"{i}.json", [PAIR]) for i in range(11)]
    _, report = load(paths, tokenizer, DataConfig(train="x"))
    lines = report.lines()
    assert [f"/{i}.json" in lines[i] for i in range(8)] == [True] * 8
    assert lines[8:10] == ["3 rows from 3 more files", lines[9]]
    assert lines[9].startswith("11 rows to train on")


def test_rows_are_a_sequence():
    parts = random_rows(7, 5, seed=0)
    rows = Rows.of(parts)
    assert rows.lengths.tolist() == [len(part) for part in parts]
    for got, part in zip(rows, parts, strict=True):
        np.testing.assert_array_equal(got.ids, part.ids)
        np.testing.assert_array_equal(got.trained, part.trained)
    assert rows[-1].ids.tolist() == parts[-1].ids.tolist()
    assert [len(r) for r in rows[2:4]] == [len(parts[2]), len(parts[3])]
    with pytest.raises(IndexError):
        rows[7]


def test_the_preview_shows_what_is_learnt(tmp_path):
    tokenizer = make_tokenizer()
    (got,), _ = loaded(tmp_path, [PAIR], tokenizer)
    assert preview(got, tokenizer) == [(BOS + PROMPT, False), (RESPONSE + EOS, True)]


def test_the_preview_is_exact_wherever_a_span_ends():
    tokenizer = make_tokenizer()
    text = f"{BOS}a日本🙂 é{EOS}b"
    ids = tokenizer(text, add_special_tokens=False)["input_ids"]
    assert len(ids) > len(text) - len(BOS + EOS)  # the characters are spread over several tokens
    random = np.random.default_rng(0)
    for _ in range(200):
        example = row(ids, random.random(len(ids)) < 0.5)
        spans = preview(example, tokenizer)
        assert "".join(part for part, _ in spans) == text
        assert all(part for part, _ in spans)
    halves = Row(np.array(ids[2:4], np.int32), np.array([False, True]))
    assert "".join(part for part, _ in preview(halves, tokenizer)) == tokenizer.decode(ids[2:4])
