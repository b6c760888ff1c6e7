"""The markers that end answers, from the rows of a file to a record and back."""

from __future__ import annotations

import json

from data_fixtures import CHATML, END, EOS, PAIR, loaded, make_tokenizer

from droplora_jax.data.end_markers import EndMarkers, token_ids

CHAT = {"messages": [{"role": "user", "content": "a"}, {"role": "assistant", "content": "b"}]}


def test_the_markers_of_rows_are_those_that_they_teach(tmp_path):
    tokenizer = make_tokenizer(chat_template=CHATML)
    end, eos = tokenizer.convert_tokens_to_ids([END, EOS])
    for records, expected in (([PAIR], eos), ([CHAT], end), ([{"text": "ab"}], eos)):
        rows, report = loaded(tmp_path, records, tokenizer)
        assert EndMarkers.of(report.end_markers, tokenizer) == EndMarkers((expected,))
        assert report.unended == 0
        assert expected in rows[0].ids[rows[0].trained]
        _, again = loaded(tmp_path, records, tokenizer)  # from the cache
        assert again.end_markers == report.end_markers


def test_rows_that_nothing_ends_are_counted(tmp_path):
    tokenizer = make_tokenizer(chat_template=CHATML.replace(END, ""))
    _, report = loaded(tmp_path, [CHAT, CHAT], tokenizer)
    assert (report.end_markers, report.unended) == ((), 2)


def test_a_record_is_json_and_what_is_not_recorded_is_nothing():
    markers = EndMarkers((2, 5), ("<stop>",))
    assert EndMarkers.of_record(json.loads(json.dumps(markers.record()))) == markers
    assert not EndMarkers.of_record(None)
    assert markers | EndMarkers((5, 7)) == EndMarkers((2, 5, 7), ("<stop>",))


def test_a_text_that_is_not_in_the_vocabulary_has_no_token():
    tokenizer = make_tokenizer()
    tokenizer.backend_tokenizer.model.unk_token = None
    ids = token_ids(tokenizer)
    assert set(ids) == {"<s>", EOS, "<|start|>", END}
    assert EndMarkers.of([END, "<|none|>"], tokenizer) == EndMarkers((ids[END],), ("<|none|>",))


def test_rows_that_are_written_otherwise_than_the_prompt_are_counted(tmp_path):
    """As where a prompt begins a thought, and the rows have none."""
    prompt = "<|start|>assistant\n{% endif %}"
    asks = make_tokenizer(
        chat_template=CHATML.replace(prompt, "<|start|>assistant\nso: {% endif %}")
    )
    thinking = {"messages": [CHAT["messages"][0], {"role": "assistant", "content": "so: b"}]}
    _, report = loaded(tmp_path, [CHAT, thinking], asks)
    assert report.unprompted == 1
    _, report = loaded(tmp_path, [CHAT, thinking], make_tokenizer(chat_template=CHATML))
    assert report.unprompted == 0
