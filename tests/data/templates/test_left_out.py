"""What the assistant says and the chat template leaves out is an error, with the way out."""

from __future__ import annotations

import pytest
from data_fixtures import CHATML, make_tokenizer

from droplora_jax.core.errors import InputError
from droplora_jax.data.formats.base import Example, Turn
from droplora_jax.data.templates import chat

CONTENT = "{{ m.content }}"
CUT = CHATML.replace(CONTENT, "{{ m.content.split('</think>')[-1] }}")  # of every answer
KEPT_LAST = CHATML.replace(
    CONTENT, "{{ m.content if loop.last else m.content.split('</think>')[-1] }}"
)
# transformers hands the reasoning on under two other names too, but not under this one.
READS_KEY = CHATML.replace(
    CONTENT, "{% if m.reasoning %}<think>{{ m.reasoning }}</think>{% endif %}{{ m.content }}"
)
CALLS_ALONE = CHATML.replace(
    CONTENT, "{% if m.tool_calls %}{{ m.tool_calls | tojson }}{% else %}{{ m.content }}{% endif %}"
)
CALL = {"type": "function", "function": {"name": "find", "arguments": {}}}
THOUGHT = "<think>\ntwice\n</think>\n\nIt is 2."
ASKED = Turn("user", "What is twice 1?")


def render(template, *turns):
    document = chat.render(Example(turns), make_tokenizer(chat_template=template))
    return [piece.text for piece in document.pieces if piece.trained]


def thinking(key):
    return Turn("assistant", "It is 2.", keys={key: "one and one"})


@pytest.mark.parametrize(
    ("template", "answer", "message"),
    [
        (CUT, Turn("assistant", THOUGHT), r"leaves out the reasoning of message 2, up to </think>, .*; it needs one that does"),
        (CUT, thinking("reasoning_content"), "leaves out the reasoning of message 2, its key reasoning_content"),
        (READS_KEY, thinking("thinking"), "its key thinking, .* write it under the key reasoning or in the content, as <think>"),
        (READS_KEY.replace(CONTENT, "{{ m.content.split('</think>')[-1] }}"), Turn("assistant", THOUGHT), "write it under the key reasoning, or"),
        (CHATML, thinking("thinking"), "write it in the content, as <think>"),
        (CALLS_ALONE, Turn("assistant", "I look it up.", (CALL,)), "does not write the content of message 2 beside its calls"),
        (CHATML.replace(CONTENT, "{{ m.content[:16] }}"), Turn("assistant", "It is two times one."), None),
        (CHATML.replace(CONTENT, "{{ m.content if m.role == 'user' }}"), Turn("assistant", "It is 2."), "does not write the content of message 2"),
    ],
)  # fmt: skip
def test_words_that_are_left_out(template, answer, message):
    if message is None:
        assert render(template, ASKED, answer)  # shortened, not passed over
        return
    with pytest.raises(InputError, match=message):
        render(template, ASKED, answer)


def test_all_that_is_left_out_is_said_at_once():
    template = CHATML.replace(CONTENT, "{{ m.content if m.role == 'assistant' }}")
    with pytest.raises(InputError) as info:
        render(template, ASKED, thinking("thinking"))
    assert len(info.value.problems) == 2


TOOL = {"type": "function", "function": {"name": "find", "parameters": {}}}
WRITES_CALLS = CHATML.replace(CONTENT, "{{ m.content }}{{ m.tool_calls | tojson if m.tool_calls }}")
LISTS_TOOLS = "{% if tools %}{{ tools | tojson }}{% endif %}"


@pytest.mark.parametrize("listed", ["", LISTS_TOOLS, "{{ tools[0] | tojson }}"])
@pytest.mark.parametrize("question", ["What is it?", "find it"])
def test_a_call_does_not_stand_for_its_tool(listed, question):
    """The name of a tool is in the rendering wherever it is called."""
    made = make_tokenizer(chat_template=listed + WRITES_CALLS)
    example = Example((Turn("user", question), Turn("assistant", "", (CALL,))), tools=(TOOL,))
    if listed:
        assert chat.render(example, made)
        return
    with pytest.raises(InputError, match="does not write the tool"):
        chat.render(example, made)


@pytest.mark.parametrize("template", [CUT, KEPT_LAST])
def test_reasoning_before_the_last_question_may_be_left_out(template):
    turns = (ASKED, Turn("assistant", THOUGHT), Turn("user", "And 3?"), Turn("assistant", "3."))
    assert render(template, *turns) == [
        "\n\nIt is 2.<|end|>",
        "3.<|end|>",
    ]


def test_reasoning_that_is_written_is_learnt():
    assert render(KEPT_LAST, ASKED, Turn("assistant", THOUGHT)) == [THOUGHT + "<|end|>"]
    (learnt,) = render(READS_KEY, ASKED, thinking("reasoning"))
    assert learnt == "<think>one and one</think>It is 2.<|end|>"


def test_no_reasoning_is_none_that_is_left_out():
    assert render(CUT, ASKED, Turn("assistant", "<think>\n\n</think>\n\nIt is 2."))
    assert render(CHATML, ASKED, Turn("assistant", "It is 2.", keys={"reasoning": " "}))


def test_a_prompt_that_ends_in_a_thought_is_asked_with():
    template = CUT.replace("<|start|>assistant\n{% endif", "<|start|>assistant\n<think>\n{% endif")
    document = chat.prompt(Example((ASKED,)), make_tokenizer(chat_template=template))
    assert document.pieces[0].text.endswith("<|start|>assistant\n<think>\n")
