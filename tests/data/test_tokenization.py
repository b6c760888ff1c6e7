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
