"""Conversations: OpenAI's and ShareGPT's messages, tools and calls, and what is out of order."""

from __future__ import annotations

import json
import re

import datasets
import pytest
from data_fixtures import CHATML, make_tokenizer, write_jsonl

from droplora_jax.core.errors import InputError
from droplora_jax.data.config import DataConfig
from droplora_jax.data.data_file import local
from droplora_jax.data.formats import FORMATS
from droplora_jax.data.formats.base import Turn
from droplora_jax.data.load import load

WITH_TOOLS = (
    "{% for t in tools or [] %}{{ t | tojson }}\n{% endfor %}"
    "{% for m in messages %}<|start|>{{ m.role }}\n{{ m.content }}{% for c in m.tool_calls %}"
    "{{ c.function | tojson }}{% endfor %}<|end|>\n{% endfor %}"
    "{% if add_generation_prompt %}<|start|>assistant\n{% endif %}"
)
FUNCTION = {"name": "find", "arguments": {"what": "é"}}
CALL = {"type": "function", "function": FUNCTION}
TOOL = {"type": "function", "function": {"name": "find", "parameters": {}}}


def user(content="a", **keys):
    return {"role": "user", "content": content, **keys}


def assistant(content="b", **keys):
    return {"role": "assistant", "content": content, **keys}


def tool(content="c", **keys):
    return {"role": "tool", "content": content, **keys}


def said(name, value):
    return {"from": name, "value": value}


def messages(*turns, **keys):
    return FORMATS["messages"].convert({"messages": list(turns), **keys})


def sharegpt(*turns, **keys):
    return FORMATS["sharegpt"].convert({"conversations": list(turns), **keys})


# --- what is read ---------------------------------------------------------------------------------


def test_calls_and_results():
    calling = assistant(None, tool_calls=[{**CALL, "id": "x"}])
    example = messages(user(), calling, tool(tool_call_id="x"), assistant(), tools=[TOOL])
    assert example.tools == (TOOL,)
    assert example.turns == (
        Turn("user", "a"),
        Turn("assistant", None, ({**CALL, "id": "x"},)),
        Turn("tool", "c", keys={"tool_call_id": "x"}),
        Turn("assistant", "b"),
    )


@pytest.mark.parametrize("arguments", [{"what": "é"}, '{"what": "é"}'])
def test_arguments_are_an_object_however_they_come(arguments):
    call = {**CALL, "function": {"name": "find", "arguments": arguments}}
    assert messages(user(), assistant(None, tool_calls=[call])).turns[1].calls == (CALL,)


@pytest.mark.parametrize("value", [FUNCTION, [FUNCTION], [FUNCTION, FUNCTION]])
def test_a_function_call_of_sharegpt_is_a_turn_of_the_assistant(value):
    example = sharegpt(
        said("human", "a"), said("function_call", json.dumps(value)), said("observation", "c")
    )
    calls = (CALL,) * (len(value) if isinstance(value, list) else 1)
    assert example.turns == (Turn("user", "a"), Turn("assistant", None, calls), Turn("tool", "c"))


@pytest.mark.parametrize(
    "tools", [[TOOL], json.dumps([TOOL]), [TOOL["function"]], TOOL["function"]]
)
def test_tools_are_wrapped_however_they_come(tools):
    assert sharegpt(said("human", "a"), said("gpt", "b"), tools=tools).tools == (TOOL,)
    assert messages(user(), assistant(), tools=tools).tools == (TOOL,)


@pytest.mark.parametrize("tools", [None, "", "[]", []])
def test_no_tools(tools):
    assert sharegpt(said("human", "a"), said("gpt", "b"), tools=tools).tools == ()


def test_a_system_key_is_the_first_turn():
    turns = [said("human", "a"), said("gpt", "b")]
    assert sharegpt(*turns, system="S").turns[0] == Turn("system", "S")
    assert sharegpt(*turns, system="").turns[0] == Turn("user", "a")
    assert sharegpt(said("system", "S"), *turns).turns[0] == Turn("system", "S")
    with pytest.raises(InputError, match="a second system message"):
        sharegpt(said("system", "S"), *turns, system="T")


def test_content_in_parts_is_joined():
    parts = [{"type": "text", "text": "a "}, {"type": "text", "text": "b"}]
    assert messages(user(parts), assistant(parts)).turns == (
        Turn("user", "a b"),
        Turn("assistant", "a b"),
    )
    with pytest.raises(
        InputError, match=r"message 1: content: part 2 must be text, is 'image_url'"
    ):
        messages(user([parts[0], {"type": "image_url", "image_url": {}}]), assistant())


def test_other_keys_of_a_message_are_the_templates():
    turn = messages(user(name="Ann", refusal=None), assistant()).turns[0]
    assert turn.keys == {"name": "Ann"}


def test_a_weight_of_0_is_not_learnt(tmp_path):
    record = {"messages": [user(), assistant("no", weight=0), user(), assistant("yes", weight=1)]}
    path = write_jsonl(tmp_path / "a.jsonl", [record])
    marked = CHATML.replace(
        "{{ m.content }}<|end|>",
        "{% if m.role == 'assistant' %}{% generation %}{{ m.content }}<|end|>{% endgeneration %}"
        "{% else %}{{ m.content }}<|end|>{% endif %}",
    )
    for template in (CHATML, marked):
        tokenizer = make_tokenizer(chat_template=template)
        (row,), _ = load(path, tokenizer, DataConfig(path))
        assert tokenizer.decode(row.ids[row.trained]) == "yes<|end|>"


@pytest.mark.parametrize("key", ["weight", "train", "training", "loss"])
@pytest.mark.parametrize("no", [0, False])
def test_the_keys_by_which_a_message_is_not_learnt(key, no):
    turns = [user(**{key: None}), assistant("no", **{key: no}), user(), assistant(**{key: 1})]
    example = messages(*turns)
    assert [turn.learnt for turn in example.turns if turn.role == "assistant"] == [False, True]
    assert not any(turn.keys for turn in example.turns)
    names = {"user": "human", "assistant": "gpt"}
    moved = [{**turn, "from": names[turn["role"]], "value": turn["content"]} for turn in turns]
    assert sharegpt(*moved).turns == example.turns
    call = {"from": "function_call", "value": json.dumps(FUNCTION), key: no}
    example = sharegpt(said("human", "a"), call, said("observation", "c"), said("gpt", "d"))
    assert [turn.learnt for turn in example.turns if turn.role == "assistant"] == [False, True]


@pytest.mark.parametrize(
    ("turn", "message"),
    [
        (user(train=True), r"message 1: train=True of the user: only messages of the assistant"),
        (user(training=1), r"message 1: training=1 of the user: only"),
        (user(train_detail=[{"begin_offset": 0}]), r"train_detail=.*ignore_keys=\[train_detail\]"),
        (user(loss_scale=0.5), r"message 1: loss_scale=0.5: a message is learnt as a whole or not"),
        (user(images=["a.png"]), r"message 1: images=.*only text is trained"),
        (user(loss="no"), r"message 1: loss='no': must be 0 or 1; data\.ignore_keys=\[loss\]"),
    ],
)
def test_keys_of_messages_that_are_not_served(turn, message):
    with pytest.raises(InputError, match=message):
        messages(turn, assistant())
    with pytest.raises(InputError, match=message):
        sharegpt({**turn, "from": "human", "value": "a"}, said("gpt", "b"))


def test_keys_of_messages_that_change_nothing_are_harmless():
    assert messages(user(weight=1, loss=True), assistant(loss_scale=1.0, images=[])).turns[0] == (
        Turn("user", "a")
    )


@pytest.mark.parametrize("whole", [True, False])
def test_messages_may_be_json(whole):
    """As in the cells of a table, and in lists of the `datasets` library's JSON."""
    turns = [user("[1] {"), assistant("{}")]
    value = json.dumps(turns) if whole else [json.dumps(turn) for turn in turns]
    assert FORMATS["messages"].convert({"messages": value}) == messages(*turns)


def test_calls_in_messages_of_their_own():
    call = {"role": "tool_call", "content": json.dumps(FUNCTION), "loss": False}
    example = messages(user(), call, {"role": "tool_response", "content": "c"}, assistant())
    assert example.turns[1:3] == (
        Turn("assistant", None, (CALL,), learnt=False),
        Turn("tool", "c"),
    )
    with pytest.raises(InputError, match="message 2: content must be JSON"):
        messages(user(), {**call, "content": "find()"}, assistant())


def test_neither_case_nor_space_makes_another_role():
    turns = messages({**user(), "role": "User "}, {**assistant(), "role": "ASSISTANT"}).turns
    assert turns == messages(user(), assistant()).turns
    assert sharegpt(said("Human", "a"), said("GPT", "b")).turns == turns


def test_messages_under_the_other_key(tmp_path):
    turns = [user(), assistant(None, tool_calls=[CALL]), tool(), assistant(weight=0), assistant()]
    assert sharegpt(*turns).turns == messages(*turns).turns
    moved = [said("human", "a"), said("gpt", "b")]
    with pytest.raises(InputError, match=r"message 1: role .*data\.columns=\{conversations: messa"):
        messages(*moved)
    path = write_jsonl(tmp_path / "a.jsonl", [{"messages": moved}])
    config = DataConfig(path, columns={"conversations": "messages"})
    assert (
        load(path, make_tokenizer(chat_template=CHATML), config)[1].sources[0].format == "sharegpt"
    )


def test_a_system_key_beside_messages():
    assert messages(user(), assistant(), system="S").turns[0] == Turn("system", "S")
    own = {"role": "system", "content": "S"}
    assert len(messages(own, user(), assistant(), system="S").turns) == 3
    assert len(messages(own, user(), assistant(), system_prompt="T").turns) == 3


def test_a_result_may_follow_a_call_in_words():
    turns = [
        said("human", "a"),
        said("gpt", "<call>{}</call>"),
        said("tool", "c"),
        said("gpt", "d"),
    ]
    assert [turn.role for turn in sharegpt(*turns).turns] == [
        "user",
        "assistant",
        "tool",
        "assistant",
    ]
    with pytest.raises(
        InputError, match="message 3: the result of a tool without a call before it"
    ):
        messages(user(), assistant(), tool(tool_call_id="x"), assistant())


@pytest.mark.parametrize("arguments", [{}, "{}", "", None])
def test_a_call_without_arguments(arguments):
    call = {"function": {"name": "now", "arguments": arguments}}
    turn = messages(user(), assistant(None, tool_calls=[call])).turns[1]
    assert turn.calls == ({"function": {"name": "now", "arguments": {}}},)


def schema(name, properties):
    parameters = {"type": "object", "properties": properties}
    return {"type": "function", "function": {"name": name, "parameters": parameters}}


def test_nulls_of_a_table_are_no_arguments_and_no_part_of_a_tool(tmp_path):
    """Nor those of the JSON that the `datasets` library writes of it."""
    tools = [
        schema("find", {"what": {"type": "string", "enum": ["a"]}}),
        schema("sum", {"n": {"type": "integer"}}),
    ]
    calls = [{"name": "find", "arguments": {"what": "a"}}, {"name": "sum", "arguments": {"n": 1}}]
    said = [assistant(None, tool_calls=[{"type": "function", "function": call}]) for call in calls]
    records = [
        {"messages": [user(), said[0], tool(tool_call_id="x"), assistant()], "tools": tools},
        {"messages": [user(), said[1], tool(), assistant()], "tools": tools[1:]},
    ]
    wanted = [FORMATS["messages"].convert(record) for record in records]
    table = datasets.Dataset.from_list(records)
    table.to_json(tmp_path / "a.jsonl")
    table.to_parquet(tmp_path / "a.parquet")
    assert '"arguments":{"what":null,"n":1}' in (tmp_path / "a.jsonl").read_text()
    for name in ("a.jsonl", "a.parquet"):
        rows = [FORMATS["messages"].convert(row) for _, row in local(tmp_path / name).records()]
        assert rows == wanted


def test_null_for_an_argument_stays_where_it_may_mean_something():
    call = {"function": {"name": "find", "arguments": {"what": None}}}
    turns = user(), assistant(None, tool_calls=[call])
    for tools in ([], [TOOL], [schema("find", {"what": {}})], [schema("sum", {"n": {}})]):
        assert messages(*turns, tools=tools).turns[1].calls == (call,)
    assert messages(*turns, tools=[schema("find", {"n": {}})]).turns[1].calls != (call,)


# Both join the arguments with text: an object is refused, or comes out as Python writes it.
JOINED = {
    "plus": "'<call>' + c.function.name + ' ' + c.function.arguments",
    "tilde": "'<call>' ~ c.function.name ~ ' ' ~ c.function.arguments",
}


@pytest.mark.parametrize("marks", [False, True])
@pytest.mark.parametrize("joined", JOINED)
@pytest.mark.parametrize("arguments", ['{"what":"é", "n": null}', '{"it\'s": 1}', "{}"])
def test_a_template_that_joins_arguments_gets_them_as_they_stand(
    tmp_path, joined, arguments, marks
):
    begin, end = ("{% generation %}", "{% endgeneration %}") if marks else ("", "")
    said = (
        "{{ m.content or '' }}{% for c in m.tool_calls or [] %}{{ "
        + JOINED[joined]
        + " }}{% endfor %}"
    )
    template = (
        "{% for m in messages %}<|start|>{{ m.role }}\n{% if m.role == 'assistant' %}"
        f"{begin}{said}<|end|>{end}{{% else %}}{said}<|end|>{{% endif %}}\n{{% endfor %}}"
        "{% if add_generation_prompt %}<|start|>assistant\n{% endif %}"
    )
    call = {"type": "function", "function": {"name": "find", "arguments": arguments}}
    turns = [user(), assistant(None, tool_calls=[call]), tool(), assistant()]
    tokenizer = make_tokenizer(chat_template=template)
    path = write_jsonl(tmp_path / "a.jsonl", [{"messages": turns}])
    (row,), _ = load(path, tokenizer, DataConfig(path))
    assert tokenizer.decode(row.ids) == tokenizer.apply_chat_template(turns, tokenize=False)
    assert tokenizer.decode(row.ids[row.trained]) == f"<call>find {arguments}<|end|>b<|end|>"


@pytest.mark.parametrize("which", ["responses", "last", "all"])
def test_what_is_trained_on(tmp_path, which):
    tokenizer = make_tokenizer(chat_template=WITH_TOOLS)
    turns = [user(), assistant(None, tool_calls=[CALL]), tool(), assistant("d")]
    path = write_jsonl(tmp_path / "a.jsonl", [{"messages": turns}])
    (row,), _ = load(path, tokenizer, DataConfig(path, train_on=which))
    call = json.dumps(FUNCTION, ensure_ascii=False)
    learnt = {
        "responses": f"{call}<|end|>d<|end|>",
        "last": "d<|end|>",
        "all": tokenizer.decode(row.ids[1:]),
    }
    assert tokenizer.decode(row.ids[row.trained]) == learnt[which]


def test_all_of_one_exchange_is_all_but_bos(tmp_path):
    path = write_jsonl(tmp_path / "a.jsonl", [{"prompt": "a", "completion": "b"}])
    (row,), _ = load(path, make_tokenizer(), DataConfig(path, train_on="all"))
    assert row.trained.tolist() == [False, True, True, True]


# --- what is out of order -------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("turns", "message"),
    [
        ([assistant()], "message 1: the first message is the assistant's"),
        ([user()], "there is no message of the assistant that is learnt"),
        ([user(), assistant(weight=0)], "no message of the assistant that is learnt"),
        ([user(), tool()], "message 2: the result of a tool without a call before it"),
        (
            [user(), assistant(None, tool_calls=[CALL]), tool(), tool()],
            "message 4: the result of a tool without a call before it",
        ),
        (
            [user(), assistant(None, tool_calls=[CALL]), user(), tool()],
            "message 4: the result of a tool without a call before it",
        ),
        (
            [
                user(),
                assistant(None, tool_calls=[{**CALL, "id": "x"}, {**CALL, "id": "y"}]),
                tool(tool_call_id="y"),
                tool(tool_call_id="y"),
            ],
            "message 4: tool_call_id='y': the calls before it that are not answered have the ids 'x'",
        ),
        (
            [{"role": "asistant", "content": "a"}],
            "message 1: role='asistant': must be one of system, ",
        ),
        ([user(tool_calls=[CALL])], "message 1: tool_calls of the user: only the assistant"),
        ([user(), assistant(weight=0.5)], "message 2: weight=0.5: must be 0 or 1"),
        (
            [user(), assistant(None, function_call=FUNCTION)],
            "message 2: function_call is no longer",
        ),
        ([user(), assistant(None, tool_calls="{")], "message 2: tool_calls must be JSON ("),
        (
            [user(), assistant(None, tool_calls=[3])],
            "message 2: tool_calls: number 1 must be an object",
        ),
        ([user(), assistant(None, tool_calls=[{"function": {}}])], "a function that has a name"),
        (
            [user(), assistant(None, tool_calls=[{"name": "f", "arguments": "{"}])],
            "message 2: tool_calls: the arguments of f must be JSON (",
        ),
        (
            [user(), assistant(None, tool_calls=[{"name": "f", "arguments": "[1]"}])],
            "message 2: tool_calls: the arguments of f must be an object, are [1]",
        ),
        ([user(3)], "message 1: content must be text, is 3"),
        ([user(None)], "message 1: content must be text, is None"),
        ([user(), assistant(["b"])], "message 2: content: part 1 must be text, is 'b'"),
        ([user("\ud800")], "message 1: content holds half of a surrogate pair"),
        (
            [user(), assistant(reasoning="\ud800")],
            "message 2: one of its keys holds half of a surrogate",
        ),
    ],
)
def test_messages_that_do_not_fit(tmp_path, turns, message):
    good = {"messages": [user(), assistant()]}
    path = write_jsonl(tmp_path / "a.jsonl", [good, {"messages": turns}])
    with pytest.raises(InputError, match=re.escape(message)) as info:
        load(path, make_tokenizer(chat_template=WITH_TOOLS), DataConfig(path, empty="error"))
    assert str(info.value).startswith(f"{path}:2: ")


@pytest.mark.parametrize(
    ("turns", "message"),
    [
        ([said("gpt", "a")], "message 1: the first message is the assistant's"),
        ([said("robot", "a")], "message 1: from='robot': must be one of system, human, "),
        ([said("human", "a"), said("observation", "b")], "message 2: the result of a tool without"),
        ([said("human", "a"), said("function_call", "find()")], "message 2: value must be JSON ("),
        ([said("human", "a"), {"from": "gpt"}], "message 2: value is missing"),
        ([{"value": "a"}], "message 1: from is missing"),
        ("hello", "conversations must be a list of objects"),
        (["hello"], "message 1 must be an object, is 'hello'"),
    ],
)
def test_conversations_that_do_not_fit(tmp_path, turns, message):
    path = write_jsonl(tmp_path / "a.jsonl", [{"conversations": turns}])
    with pytest.raises(InputError, match=re.escape(message)) as info:
        load(path, make_tokenizer(chat_template=WITH_TOOLS), DataConfig(path))
    assert str(info.value).startswith(f"{path}:1: ")
    assert "the format sharegpt has the keys conversations" in str(info.value)


ALTERNATING = (
    "{% for m in messages %}{% if m.role != loop.cycle('user', 'assistant') %}"
    "{{ raise_exception('roles must alternate') }}{% endif %}"
    "<|start|>{{ m.role }}\n{{ m.content }}<|end|>\n{% endfor %}"
    "{% if add_generation_prompt %}<|start|>assistant\n{% endif %}"
)


@pytest.mark.parametrize("marks", [False, True])
@pytest.mark.parametrize(
    ("roles", "number"),
    [("uau" + "ua", 4), ("uu" + "a", 2), ("uaua" + "a", 5), ("ua" + "s" + "ua", 3)],
)
def test_the_message_that_the_chat_template_refuses_is_named(tmp_path, roles, number, marks):
    names = {"u": "user", "a": "assistant", "s": "system"}
    record = {"messages": [{"role": names[role], "content": "x"} for role in roles]}
    path = write_jsonl(tmp_path / "a.jsonl", [record])
    template = ALTERNATING + ("{% generation %}{% endgeneration %}" if marks else "")
    with pytest.raises(InputError) as info:
        load(path, make_tokenizer(chat_template=template), DataConfig(path))
    read = ", ".join(names[role] for role in roles[:number])
    assert str(info.value) == (
        f"{path}:1: message {number}: data.template=chat: the chat template fails (roles must "
        f"alternate); the roles up to it are {read}"
    )


def test_numbers_are_those_of_the_file(tmp_path):
    """Also where a system turn that is no message stands before them."""
    record = {"conversations": [said("human", "a"), said("human", "b"), said("gpt", "c")]}
    path = write_jsonl(tmp_path / "a.jsonl", [{**record, "system": "S"}])
    template = "{{ messages[0].content }}" + ALTERNATING.replace("messages %}", "messages[1:] %}")
    with pytest.raises(InputError, match=r"a\.jsonl:1: message 2: "):
        load(path, make_tokenizer(chat_template=template), DataConfig(path))


@pytest.mark.parametrize(
    ("template", "record", "message"),
    [
        (
            CHATML,
            {"messages": [user(), assistant()], "tools": [TOOL]},
            "does not write the tool ('find')",
        ),
        (
            CHATML,
            {"messages": [user(), assistant(None, tool_calls=[CALL])]},
            "does not write the call in message 2 ('find')",
        ),
        (
            CHATML.replace(
                "{{ m.content }}", "{% if m.role != 'system' %}{{ m.content }}{% endif %}"
            ),
            {"messages": [{"role": "system", "content": "Be kind."}, user(), assistant()]},
            "does not write the message 1 of the system ('kind')",
        ),
    ],
)
def test_what_the_chat_template_would_pass_over(tmp_path, template, record, message):
    path = write_jsonl(tmp_path / "a.jsonl", [record])
    with pytest.raises(InputError, match=re.escape(message)) as info:
        load(path, make_tokenizer(chat_template=template), DataConfig(path))
    assert str(info.value).startswith(f"{path}:1: ")


@pytest.mark.parametrize("template", ["alpaca", "none"])
@pytest.mark.parametrize("keys", [{"tools": [TOOL]}, {}])
def test_other_templates_have_no_place_for_tools(tmp_path, template, keys):
    calls = {} if keys else {"tool_calls": [CALL]}
    path = write_jsonl(tmp_path / "a.jsonl", [{"messages": [user(), assistant(**calls)], **keys}])
    with pytest.raises(InputError, match=rf"data\.template={template} has no place for tools"):
        load(path, make_tokenizer(), DataConfig(path, template=template))


def test_a_single_exchange_goes_with_any_template(tmp_path):
    tokenizer = make_tokenizer()
    path = write_jsonl(tmp_path / "a.jsonl", [{"messages": [user(), assistant()]}])
    (row,), _ = load(path, tokenizer, DataConfig(path, template="none"))
    assert tokenizer.decode(row.ids) == "<s>ab</s>"


def test_an_empty_answer_drops_the_conversation(tmp_path):
    records = [
        {"messages": [user(), assistant(), user(), assistant("")]},
        {"messages": [user(), assistant()]},
        {"messages": [user(), assistant(None)]},
    ]
    path = write_jsonl(tmp_path / "a.jsonl", records)
    rows, report = load(path, make_tokenizer(chat_template=CHATML), DataConfig(path))
    assert (len(rows), report.dropped_empty) == (1, 2)
    assert report.empty == (f"{path}:1: message 4: content", f"{path}:3: message 2: content")
