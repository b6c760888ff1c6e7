"""The decoded row that shows what is trained on."""

from __future__ import annotations

import numpy as np
from data_fixtures import BOS, EOS, PAIR, PROMPT, RESPONSE, loaded, make_tokenizer

from droplora_jax.data.preview import preview
from droplora_jax.data.rows import Row, row


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
