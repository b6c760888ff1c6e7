"""Templates: the text that the model sees, and which part of it is learnt."""

from __future__ import annotations

from dataclasses import replace

import pytest
from data_fixtures import CHATML, make_tokenizer, write_json

from droplora_jax.core.errors import InputError
from droplora_jax.data.config import DataConfig
from droplora_jax.data.formats import FORMATS
from droplora_jax.data.formats.base import Example, Turn, exchange
from droplora_jax.data.load import load
from droplora_jax.data.templates import TEMPLATES
from droplora_jax.data.templates.base import Document, Piece

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
        (
            "{{ messages | length }}" + CHATML.replace("{{ m.content }}", "{{ m.content * 2 }}"),
            "message 3 this chat template renders otherwise",
        ),
    ],
)
def test_chat_templates_that_can_not_be_used(template, message):
    with pytest.raises(InputError, match=message):
        chat(CONVERSATION, template)


REASONING = (
    "{% for m in messages %}<|start|>{{ m.role }}\n{% if m.role == 'assistant' %}"
    "{% generation %}{% if loop.last %}<think>{{ m.reasoning_content }}</think>{% endif %}"
    "{{ m.content.split('</think>')[-1] | trim }}<|end|>{% endgeneration %}"
    "{% else %}{{ m.content }}<|end|>{% endif %}{{ '\\n' }}{% endfor %}"
    "{% if add_generation_prompt %}<|start|>assistant\n{% endif %}"
)


@pytest.mark.parametrize("thought", ["", "<think>so</think>\n"])
def test_earlier_answers_whose_reasoning_is_left_out(thought):
    turns = [
        Turn("user", "Hi"),
        Turn("assistant", f"{thought}Hello! "),
        Turn("user", "Hello! Who?"),
        Turn("assistant", "Hello!", keys={"reasoning_content": "hm"}),
    ]
    plain = REASONING.replace("{% generation %}", "").replace("{% endgeneration %}", "")
    got = chat(Example(tuple(turns)), plain)
    assert got == chat(Example(tuple(turns)), REASONING)
    assert [text for text, trained in got if trained] == [
        "Hello!<|end|>",
        "<think>hm</think>Hello!<|end|>",
    ]


def test_the_end_marker_of_every_turn_is_learnt_where_the_whole_has_an_end_of_its_own():
    template = (
        "{% for m in messages %}<|start|>{{ m.role }}\n{{ m.content }}<|end|>{{ '\\n' }}{% endfor %}"
        "{% if add_generation_prompt %}<|start|>assistant\n{% else %}{{ eos_token }}{% endif %}"
    )
    got = chat(CONVERSATION, template)
    learnt = [text for text, trained in got if trained]
    assert learnt == ["Hello!<|end|>", "I am\na model<|end|>\n</s>"]


def test_earlier_calls_that_are_rendered_otherwise_later_on():
    """As where an empty thought stands in the last turn of the assistant alone."""
    template = (
        "{% for m in messages %}<|start|>{{ m.role }}\n{% if loop.last and m.role == 'assistant' %}<think></think>{% endif %}"
        "{{ m.content }}{% for c in m.tool_calls %}{% if m.content %}{{ '\\n' }}{% endif %}"
        "<call>{{ c.function | tojson }}</call>{% endfor %}<|end|>{{ '\\n' }}{% endfor %}"
        "{% if add_generation_prompt %}<|start|>assistant\n{% endif %}"
    )
    call = {"type": "function", "function": {"name": "find", "arguments": {}}}
    for content in (None, "", "Wait."):
        turns = (
            Turn("user", "Hi"),
            Turn("assistant", content, (call,)),
            Turn("tool", "3"),
            Turn("assistant", "It is 3"),
        )
        got = chat(Example(turns), template)
        assert [text for text, trained in got if trained] == [
            f"{content}\n" * bool(content)
            + '<call>{"name": "find", "arguments": {}}</call><|end|>',
            "<think></think>It is 3<|end|>",
        ]


def test_mathematics_asks_for_steps_as_the_paper_does():
    row = {"instruction": "What is 2 + 2?", "output": "The answer is: 4"}
    pieces = TEMPLATES["alpaca_steps"](FORMATS["alpaca"].convert(row), None).pieces
    assert [piece.text for piece in pieces] == [
        "Below is an instruction that describes a task. Write a response that appropriately "
        "completes the request.\n\n### Instruction:\nWhat is 2 + 2?\n\n"
        "### Response: Let's think step by step.",
        "The answer is: 4",
    ]


MARKED = (
    "{% for m in messages %}<|start|>{{ m.role }}|{% if m.role == 'assistant' %}"
    "{% generation %}{{ m.content }}{% endgeneration %}{% else %}{{ m.content }}{% endif %}END"
    "{% endfor %}"
)


@pytest.mark.parametrize(
    ("end", "learnt"),
    [
        ("<|end|>", ["Hello!<|end|>", "I am\na model<|end|>"]),
        (" </s>\n", ["Hello! </s>", "I am\na model </s>"]),
        # What follows is no end marker, but the next header.
        ("\n", ["Hello!", "I am\na model"]),
        (".<|end|>", ["Hello!", "I am\na model"]),
    ],
)
def test_the_end_marker_is_learnt_where_the_marks_leave_it_out(end, learnt):
    got = chat(CONVERSATION, MARKED.replace("END", end))
    assert [text for text, trained in got if trained] == learnt


def test_what_is_marked_is_learnt_where_renderings_are_no_prefixes():
    """As in templates that leave the reasoning of earlier answers out."""
    template = MARKED.replace(
        "{% generation %}", "{% generation %}{% if loop.last %}<think>{% endif %}"
    ).replace("END", "<|end|>")
    got = chat(CONVERSATION, template)
    assert [text for text, trained in got if trained] == [
        "Hello!<|end|>",
        "<think>I am\na model<|end|>",
    ]


def test_marks_that_are_not_one_a_message_leave_weights_open():
    turns = (Turn("user", "a"), Turn("assistant", "b", learnt=False), Turn("assistant", "c"))
    twice = MARKED.replace(
        "{{ m.content }}{% endgen",
        "{{ m.content }}{% endgeneration %}-{% generation %}{% endgen",
        1,
    )
    with pytest.raises(InputError, match="marks 4 places as generated, where the assistant has 2"):
        chat(Example(turns), twice)


def test_a_template_for_tools_is_taken_where_there_are_tools():
    tokenizer = make_tokenizer(
        chat_template={"default": CHATML, "tool_use": "{{ tools[0].function.name }}" + CHATML}
    )
    tool = {"type": "function", "function": {"name": "find"}}
    text = "".join(text for text, _ in pieces("chat", replace(QUESTION, tools=(tool,)), tokenizer))
    assert text.startswith("find<|start|>user")
    assert pieces("chat", QUESTION, tokenizer)[0][0].startswith("<|start|>user")


def test_what_is_trained_on():
    pieces = [("a", False), ("b", True), ("c", False), ("d", True), ("e", False)]
    document = Document(tuple(Piece(*piece) for piece in pieces))
    expected = {"responses": "bd", "last": "d", "all": "abcde"}
    for which, texts in expected.items():
        got = document.trained_on(which).pieces
        assert [piece.text for piece in got] == list("abcde")
        assert "".join(piece.text for piece in got if piece.trained) == texts
