"""The forms in which a chat template takes calls."""

from __future__ import annotations

import json

import pytest
from data_fixtures import make_tokenizer
from transformers.utils.chat_template_utils import render_jinja_template

from droplora_jax.core.errors import InputError
from droplora_jax.data.formats.base import Example, Turn
from droplora_jax.data.templates import chat

ARGUMENTS = {"a": 1}
CALL = {"type": "function", "function": {"name": "find", "arguments": ARGUMENTS}}
TURNS = (Turn("user", "Hi"), Turn("assistant", None, (CALL,)), Turn("tool", "5"))
HEAD = "{% for m in messages %}<|start|>{{ m.role }}\n"
TAIL = "<|end|>{% endfor %}{% if add_generation_prompt %}<|start|>assistant\n{% endif %}"
AS_JSON = "{% for c in m.tool_calls or [] %}{{ c.function | tojson }}{% endfor %}"
AS_TEXT = (
    "{% for c in m.tool_calls or [] %}{{ c.function.name + ': ' + c.function.arguments }}"
    "{% endfor %}"
)
# The content beside a call as templates read it, and the one value of it that they take.
CONTENTS = {
    "{{ m.content.split('</think>')[-1] }}": "",
    "{{ m.content + '' if m.role != 'assistant' or m.content is not none }}": None,
}


@pytest.mark.parametrize(("calls", "joined"), [(AS_JSON, False), (AS_TEXT, True)])
@pytest.mark.parametrize("content", CONTENTS)
def test_a_call_without_content_is_written_as_the_template_takes_it(content, calls, joined):
    made = make_tokenizer(chat_template=HEAD + content + calls + TAIL)
    document = chat.render(Example(TURNS), made)
    arguments = json.dumps(ARGUMENTS) if joined else ARGUMENTS
    call = {**CALL, "function": {"name": "find", "arguments": arguments}}
    messages = [
        {"role": "user", "content": "Hi"},
        {"role": "assistant", "content": CONTENTS[content], "tool_calls": [call]},
        {"role": "tool", "content": "5"},
    ]
    # `apply_chat_template` takes a null away before the template sees it.
    (expected,), _ = render_jinja_template([messages], chat_template=made.chat_template)
    assert "".join(piece.text for piece in document.pieces) == expected
    (learnt,) = (piece.text for piece in document.pieces if piece.trained)
    assert learnt.startswith(("find: ", '{"name": "find"'))
    assert learnt.endswith("<|end|>")


def test_the_error_is_that_of_the_first_form():
    failing = "{{ raise_exception('no calls here') if m.tool_calls else m.content }}"
    made = make_tokenizer(chat_template=HEAD + failing + TAIL)
    with pytest.raises(InputError, match="no calls here"):
        chat.render(Example(TURNS), made)
