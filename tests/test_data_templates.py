"""Templates: the text that the model sees, and which part of it is learnt."""

from __future__ import annotations

import pytest
from data_fixtures import CHATML, make_tokenizer, write_json

from droplora_jax.data import FORMATS, TEMPLATES, DataConfig, Example, Piece, Turn, load
from droplora_jax.data.formats.base import exchange
from droplora_jax.errors import InputError

PLAIN = make_tokenizer()
QUESTION = exchange("Add.", "3")
CONVERSATION = Example(
    (
        Turn("system", "Be kind."),
        Turn("user", "Hi"),
        Turn("assistant", "Hello!"),
        Turn("user", "Who?"),
        Turn("assistant", "I am\na model"),
    )
)


def pieces(name, example, tokenizer=PLAIN):
    return [(p.text, p.trained) for p in TEMPLATES[name](example, tokenizer).pieces]


def chat(example, template):
    return pieces("chat", example, make_tokenizer(chat_template=template))


def test_alpaca_is_the_wrapper_of_the_published_results():
    assert pieces("alpaca", QUESTION) == [
        (
            "Below is an instruction that describes a task. Write a response that appropriately "
            "completes the request.\n\n### Instruction:\nAdd.\n\n### Response:\n",
            False,
        ),
        ("3", True),
    ]


def test_alpaca_with_an_input_that_holds_braces():
    assert pieces("alpaca", exchange("Add {x}.", "3", input="{1} 2")) == [
        (
            "Below is an instruction that describes a task, paired with an input that provides "
            "further context. Write a response that appropriately completes the request.\n\n"
            "### Instruction:\nAdd {x}.\n\n### Input:\n{1} 2\n\n### Response:\n",
            False,
        ),
        ("3", True),
    ]


def test_alpaca_refuses_to_wrap_twice():
    wrapped = TEMPLATES["alpaca"](QUESTION, PLAIN).pieces[0].text
    with pytest.raises(InputError, match=r"wrapped twice; set data\.template=none"):
        TEMPLATES["alpaca"](exchange(wrapped, "3"), PLAIN)
    assert pieces("none", exchange(wrapped, "3")) == [(wrapped, False), ("3", True)]


def test_none_takes_the_prompt_as_it_is_and_a_text_whole():
    assert pieces("none", exchange(" a ", " b")) == [(" a ", False), (" b", True)]
    assert pieces("none", exchange("a", "b", input="c")) == [("a\nc", False), ("b", True)]
    document = TEMPLATES["none"](Example(text="all"), PLAIN)
    assert document.pieces == (Piece("all", True),)
    assert document.split


@pytest.mark.parametrize("name", ["alpaca", "none"])
def test_a_longer_conversation_needs_a_chat_template(name):
    with pytest.raises(InputError, match=r"system, user, assistant.*data\.template=chat"):
        TEMPLATES[name](CONVERSATION, PLAIN)


@pytest.mark.parametrize("name", ["alpaca", "chat"])
def test_plain_text_goes_with_none(name):
    with pytest.raises(InputError, match=f"template={name} needs .*plain text goes with none"):
        TEMPLATES[name](Example(text="all"), make_tokenizer(chat_template=CHATML))


def test_chat_learns_every_assistant_turn_with_its_end_marker_and_nothing_else():
    assert chat(CONVERSATION, CHATML) == [
        (
            "<|start|>system\nBe kind.<|end|>\n<|start|>user\nHi<|end|>\n<|start|>assistant\n",
            False,
        ),
        ("Hello!<|end|>", True),
        ("\n<|start|>user\nWho?<|end|>\n<|start|>assistant\n", False),
        ("I am\na model<|end|>", True),
        ("\n", False),
    ]


def test_chat_without_a_generation_prompt_does_not_learn_the_header():
    template = CHATML.partition("{% if")[0]
    for answer in ("assistant", "a", "b", "start", "end"):
        example = exchange("Hi", answer)
        assert chat(example, template) == [
            ("<|start|>user\nHi<|end|>\n<|start|>assistant\n", False),
            (f"{answer}<|end|>", True),
            ("\n", False),
        ]


def test_chat_whose_prompt_ends_with_the_users_turn():
    template = (
        "{{ bos_token }}{% for m in messages %}{% if m.role == 'user' %}[INST] {{ m.content }} "
        "[/INST]{% else %} {{ m.content | trim }} {{ eos_token }}{% endif %}{% endfor %}"
    )
    example = Example(CONVERSATION.turns[1:])
    assert chat(example, template) == [
        ("<s>[INST] Hi [/INST]", False),
        (" Hello! </s>", True),
        ("[INST] Who? [/INST]", False),
        (" I am\na model </s>", True),
    ]


def test_chat_learns_two_assistant_turns_in_a_row():
    example = Example((Turn("user", "a"), Turn("assistant", "b"), Turn("assistant", "c")))
    assert [text for text, trained in chat(example, CHATML) if trained] == ["b<|end|>", "c<|end|>"]


def test_chat_joins_instruction_and_input():
    text = "".join(text for text, _ in chat(exchange("Add.", "3", input="1 2"), CHATML))
    assert "<|start|>user\nAdd.\n1 2<|end|>" in text


def test_chat_does_not_depend_on_the_day():
    today = (
        "{% set date = strftime_now('%d %b %Y') if date_string is not defined else date_string %}"
    )
    assert chat(QUESTION, today + "{{ date }}|" + CHATML)[0][0].startswith("26 Jul 2024|")
    with pytest.raises(InputError, match=r"writes today's date \(strftime_now\)"):
        chat(QUESTION, "{{ strftime_now('%d %b %Y') }}" + CHATML)


def test_chat_needs_a_template(tmp_path):
    path = write_json(tmp_path / "a.json", [{"messages": [{"role": "assistant", "content": "a"}]}])
    with pytest.raises(InputError, match="the first message is the assistant's"):
        load(path, make_tokenizer(chat_template=CHATML), DataConfig(train=path))
    with pytest.raises(InputError, match="the tokenizer has no chat template"):
        TEMPLATES["chat"](QUESTION, PLAIN)


@pytest.mark.parametrize(
    ("template", "message"),
    [
        ("{{ raise_exception('roles must alternate') }}", r"fails \(roles must alternate\)"),
        ("{% for m in messages %}{{ m.name.first }}{% endfor %}", "the chat template fails"),
        ("{% for m in messages %}", "the chat template fails"),
        ("{{ messages | length }}" + CHATML, "message 3 this chat template renders otherwise"),
        # The last answer is written otherwise than the earlier ones, as reasoning templates do.
        (
            CHATML.replace(
                "{{ m.content }}",
                "{% if loop.last and m.role == 'assistant' %}<think>{% endif %}{{ m.content }}",
            ),
            "message 3 this chat template renders otherwise",
        ),
    ],
)
def test_chat_templates_that_can_not_be_used(template, message):
    with pytest.raises(InputError, match=message):
        chat(CONVERSATION, template)


def test_mathematics_asks_for_steps_as_the_paper_does():
    row = {"instruction": "What is 2 + 2?", "output": "The answer is: 4"}
    pieces = TEMPLATES["alpaca_steps"](FORMATS["alpaca"].convert(row), None).pieces
    assert [piece.text for piece in pieces] == [
        "Below is an instruction that describes a task. Write a response that appropriately "
        "completes the request.\n\n### Instruction:\nWhat is 2 + 2?\n\n"
        "### Response: Let's think step by step.",
        "The answer is: 4",
    ]
