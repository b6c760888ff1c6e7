"""Token ids of documents: special tokens, and which tokens are trained."""

from __future__ import annotations

import numpy as np
import pytest
from data_fixtures import BOS, CHATML, EOS, PAIR, PROMPT, RESPONSE, loaded, make_tokenizer

from droplora_jax.core.errors import InputError
from droplora_jax.data.templates.base import Document, Piece
from droplora_jax.data.tokenization import encode


def bare(tokenizer, text):
    return tokenizer(text, add_special_tokens=False)["input_ids"]


@pytest.mark.parametrize(
    ("adds_bos", "adds_eos", "pad"),
    [(False, False, None), (False, True, EOS), (True, False, EOS), (True, True, None)],
)
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


# --- rows that are written out already ------------------------------------------------------------

TURNS = [{"role": "user", "content": "a"}, {"role": "assistant", "content": "b"}]
WRITERS = {
    "bos and eos": "{{ bos_token }}a{{ eos_token }}b{{ eos_token }}",
    "a line end behind eos": "{{ bos_token }}a: b{{ eos_token }}\n",
    "eos alone": "a: b{{ eos_token }}",
}


@pytest.mark.parametrize("writer", WRITERS)
@pytest.mark.parametrize("cut", [None, 3, 4])
def test_bos_and_eos_that_stand_in_a_text_are_not_added(tmp_path, writer, cut):
    """The text as the tokenizer reads it, whether it stands in one piece or in two."""
    tokenizer = make_tokenizer(chat_template=WRITERS[writer])
    text = tokenizer.apply_chat_template(TURNS, tokenize=False)
    whole = {"text": text} if cut is None else {"prompt": text[:cut], "completion": text[cut:]}
    (got,), report = loaded(tmp_path, [whole], tokenizer)
    begun = text.startswith(BOS)
    assert tokenizer.decode(got.ids) == text if begun else BOS + text
    assert got.ids.tolist().count(tokenizer.bos_token_id) == 1
    assert got.trained[-1]
    assert (report.has_bos, report.has_eos) == (begun, 1)
    places = "BOS in 1 row, EOS in 1 row" if begun else "EOS in 1 row"
    assert f"written out already and not added again: {places}" in report.lines()


def test_bos_and_eos_are_counted_over_files_and_from_the_cache(tmp_path):
    tokenizer = make_tokenizer()
    rows = [{"text": f"{BOS}a{EOS}"}, {"text": f"a{EOS}b"}, {"text": f"b{EOS}"}]
    for _ in range(2):
        got, report = loaded(tmp_path, rows, tokenizer)
        assert [tokenizer.decode(row.ids) for row in got] == [
            f"{BOS}a{EOS}",
            f"{BOS}a{EOS}b{EOS}",
            f"{BOS}b{EOS}",
        ]
        assert (report.has_bos, report.has_eos) == (1, 2)
    _, report = loaded(tmp_path, [PAIR], tokenizer)
    assert not any("written out already" in line for line in report.lines())
