"""Every answer is learnt with the marker that the chat template ends it with, whatever precedes."""

from __future__ import annotations

import itertools
import re

import numpy as np
import pytest
from data_fixtures import CHATML, END, EOS, START, make_tokenizer
from tokenizers import AddedToken

from droplora_jax.data.end_markers import EndMarkers, markers_of
from droplora_jax.data.formats.base import Example, Turn
from droplora_jax.data.templates import chat
from droplora_jax.data.tokenization import encode

ADDED = ("<think>", "</think>", "<call>", "</call>", "<answer>", "</answer>", "<|eom|>")
CALL = {"type": "function", "function": {"name": "find", "arguments": {"a": 1}}}
BODY = (
    "{{ m.content or '' }}{% for c in m.tool_calls or [] %}"
    "<call>{{ c.function | tojson }}</call>{% endfor %}"
)
HEAD = "{% for m in messages %}<|start|>{{ m.role }}\n"
PROMPT = "{% if add_generation_prompt %}<|start|>assistant\n{% endif %}"
TAIL = "<|end|>{{ '\\n' }}{% endfor %}"
GENERATED = "{% if m.role == 'assistant' %}{% generation %}BODY{% endgeneration %}{% else %}{{ m.content }}{% endif %}"

# What ends an answer, and a call, under each template.
TEMPLATES = {
    "plain": (HEAD + BODY + TAIL + PROMPT, END, END),
    "no prompt for generation": (HEAD + BODY + TAIL, END, END),
    "marks without the end": (HEAD + GENERATED.replace("BODY", BODY) + TAIL + PROMPT, END, END),
    "marks with the end": (
        HEAD + GENERATED.replace("BODY", BODY + END) + "{{ '\\n' }}{% endfor %}" + PROMPT,
        END,
        END,
    ),
    "another last answer": (
        HEAD + "{% if m.role == 'assistant' and loop.last %}<think></think>{% endif %}" + BODY
        + TAIL + PROMPT,
        END,
        END,
    ),
    "reasoning of the last answer alone": (
        HEAD + "{% if m.role == 'assistant' and not loop.last %}"
        + BODY.replace("m.content or ''", "(m.content or '').split('</think>')[-1]")
        + "{% else %}" + BODY + "{% endif %}" + TAIL + PROMPT,
        END,
        END,
    ),
    "EOS": (
        "{{ bos_token }}{% for m in messages %}{% if m.role != 'assistant' %}[INST] {{ m.content }} "
        "[/INST]{% else %}" + BODY + "{{ eos_token }}{% endif %}{% endfor %}",
        EOS,
        EOS,
    ),
    "an end of the whole": (HEAD + BODY + TAIL + "{% if not add_generation_prompt %}</s>{% endif %}" + PROMPT, END, END),
    "another end behind calls": (
        HEAD + BODY + "{% if m.tool_calls %}<|eom|>{% else %}<|end|>{% endif %}{{ '\\n' }}{% endfor %}" + PROMPT,
        END,
        "<|eom|>",
    ),
    "another last answer and another end behind calls": (
        HEAD + "{% if m.role == 'assistant' and loop.last %}<think></think>{% endif %}" + BODY
        + "{% if m.tool_calls %}</call><|eom|>{% else %}<|end|>{% endif %}{% endfor %}" + PROMPT,
        END,
        "<|eom|>",
    ),
}  # fmt: skip


def tokenizer(template):
    made = make_tokenizer(chat_template=template)
    made.add_tokens([AddedToken(text, special=False, normalized=False) for text in ADDED])
    return made


def conversations():
    """Answers that end in every added token, and calls, each in the middle and at the end."""
    for words in (*ADDED, END, EOS, START, "end", "a\n", "Hello! "):
        last = words if words in (END, EOS, START) else f"so {words}"
        yield [f"ab {words}", last]
    yield from (["Hi", CALL], [CALL, "It is 3."], ["<answer>5</answer>", CALL, CALL, "</call>"])


def turns_of(answers):
    for answer in answers:
        yield Turn("user", "say")
        if isinstance(answer, str):
            yield Turn("assistant", answer)
        else:
            yield Turn("assistant", None, (answer,))
            yield Turn("tool", "5")


@pytest.mark.parametrize("name", TEMPLATES)
def test_the_end_marker_of_every_answer_is_learnt(name):
    template, of_answer, of_call = TEMPLATES[name]
    made = tokenizer(template)
    for answers in conversations():
        if name == "reasoning of the last answer alone" and answers[0] == "ab </think>":
            continue  # nothing of the first answer is left
        turns = tuple(turns_of(answers))
        turns = turns[:-1] if turns[-1].role == "tool" else turns
        document = chat.render(Example(turns), made)
        (row,) = encode([document], made)
        messages = [chat_message(turn) for turn in turns]
        assert row.ids.tolist() == made.apply_chat_template(messages, return_dict=False)
        learnt = [piece.text for piece in document.pieces if piece.trained]
        ends = [of_answer if isinstance(answer, str) else of_call for answer in answers]
        assert len(learnt) == len(answers), (name, answers)
        for text, answer, end in zip(learnt, answers, ends, strict=True):
            words = (answer if isinstance(answer, str) else "</call>").rstrip()
            kept = words if words in text else words.split("</think>")[-1]
            ended = rf"{re.escape(kept)}\s*{re.escape(end)}"
            assert re.search(ended, text), (name, answers, text)
        assert set(markers_of(document, made)) == set(ends), (name, answers)


def chat_message(turn):
    calls = {"tool_calls": list(turn.calls)} if turn.calls else {}
    return {"role": turn.role, "content": turn.content, **calls}


ROLES = "{% for m in messages %}<|{{ m.role }}|>\n"
BY_ROLE = (
    ROLES + "{{ m.content }}{% endfor %}{% if add_generation_prompt %}<|assistant|>\n{% endif %}"
)
BY_PLACE = (
    HEAD
    + BODY
    + "{% if loop.last and m.role == 'assistant' %}</s>{% else %}<|end|>{% endif %}{% endfor %}"
    + PROMPT
)


@pytest.mark.parametrize(
    ("template", "ends", "markers"),
    [
        (BY_PLACE, ["<|end|>", "</s>"], {END, EOS}),
        (BY_PLACE.replace(BODY, GENERATED.replace("BODY", BODY)), ["<|end|>", "</s>"], {END, EOS}),
        (BY_ROLE, ["<|user|>", ""], {"<|user|>", ""}),
    ],
    ids=["another marker at the end", "the same with marks", "the marker of the next role"],
)
def test_a_marker_that_only_what_follows_shows_is_learnt(template, ends, markers):
    made = tokenizer(template)
    roles = [AddedToken(f"<|{role}|>", special=True) for role in ("user", "assistant")]
    made.add_tokens(roles, special_tokens=True)
    document = chat.render(Example(tuple(turns_of(["Hi", "so"]))), made)
    learnt = [piece.text for piece in document.pieces if piece.trained]
    assert learnt == [f"Hi{ends[0]}", f"so{ends[1]}"]
    assert set(document.end_markers) == markers


def test_an_end_without_a_token_of_its_own_is_learnt_as_text():
    template = CHATML.replace(END, "<|stop|>")
    made = tokenizer(template)
    document = chat.render(Example(tuple(turns_of(["Hi </answer>", "so"]))), made)
    learnt = [piece.text.strip() for piece in document.pieces if piece.trained]
    assert learnt == ["Hi </answer><|stop|>", "so<|stop|>"]
    assert EndMarkers.of(document.end_markers, made) == EndMarkers((), ("<|stop|>",))


def test_a_template_that_ends_answers_with_nothing_has_no_marker():
    template = HEAD + BODY + "{{ '\\n\\n' }}{% endfor %}" + PROMPT
    made = tokenizer(template)
    document = chat.render(Example(tuple(turns_of(["Hi", "so </answer>"]))), made)
    assert document.end_markers == ("",)
    assert [p.text for p in document.pieces if p.trained] == ["Hi\n\n", "so </answer>\n\n"]


ALWAYS = "<|start|>assistant\n"
SPOKEN = "{% for m in messages %}{{ m.role }}: {{ m.content }}STOP\n{% endfor %}assistant: "


@pytest.mark.parametrize(
    ("template", "end", "marker"),
    [
        (HEAD + BODY + TAIL + ALWAYS, END, END),
        (HEAD + GENERATED.replace("BODY", BODY) + TAIL + ALWAYS, END, END),
        (SPOKEN, "STOP\n", "STOP"),
        (SPOKEN.replace("STOP", ""), "\n", ""),
        (SPOKEN.replace("STOP", "{{ eos_token }}"), EOS, EOS),
    ],
    ids=["a token", "the same with marks", "a text", "nothing", "EOS"],
)
def test_a_prompt_behind_every_message_is_not_learnt(template, end, marker):
    """Some templates write the prompt for an answer without being asked for it."""
    made = tokenizer(template)
    turns = tuple(turns_of(["Hi", "so"]))
    for part in (turns[:2], turns):
        document = chat.render(Example(part), made)
        learnt = [piece.text for piece in document.pieces if piece.trained]
        assert learnt == [f"{words}{end}" for words in ("Hi", "so")[: len(part) // 2]]
        assert set(document.end_markers) == {marker}
        asked = chat.prompt(Example(part[:-1]), made)
        text = "".join(piece.text for piece in document.pieces)
        assert text.startswith(asked.pieces[0].text + part[-1].content + end)
        assert asked.end_markers == (marker,) * bool(marker)


def test_an_end_that_the_question_has_too_is_learnt_where_the_template_writes_it():
    """The last message is closed only where the template is asked for a prompt."""
    body = HEAD + "{{ m.content }}{% if add_generation_prompt or not loop.last %}<|end|>{{ '\n' }}"
    made = tokenizer(body + "{% endif %}{% endfor %}" + PROMPT)
    document = chat.render(Example(tuple(turns_of(["Hi", "so"]))), made)
    assert [piece.text for piece in document.pieces if piece.trained] == ["Hi<|end|>", "so"]
    assert document.end_markers == (END, "")  # the last answer is ended by nothing


@pytest.mark.parametrize("name", TEMPLATES)
def test_the_prompt_is_the_templates_own(name):
    template, of_answer, _ = TEMPLATES[name]
    made = tokenizer(template)
    turns = (Turn("user", "Hi"), Turn("assistant", "Yes?"), Turn("user", "Why?"))
    document = chat.prompt(Example(turns), made)
    text = "".join(piece.text for piece in document.pieces)
    own = made.apply_chat_template(
        [chat_message(turn) for turn in turns], add_generation_prompt=True, tokenize=False
    )
    without = made.apply_chat_template([chat_message(turn) for turn in turns], tokenize=False)
    assert text == (own if own != without else without + text[len(without) :])
    assert text.endswith(("assistant\n", "[/INST]"))
    assert document.end_markers == (of_answer,)


def test_rows_are_those_of_the_templates_marks():
    """With marks and without, the same template trains the same tokens."""
    marked, plain = (tokenizer(TEMPLATES[n][0]) for n in ("marks without the end", "plain"))
    for answers in itertools.islice(conversations(), 5):
        example = Example(tuple(turns_of(answers)))
        one, other = (encode([chat.render(example, t)], t)[0] for t in (marked, plain))
        np.testing.assert_array_equal(one.ids, other.ids)
        np.testing.assert_array_equal(one.trained, other.trained)
