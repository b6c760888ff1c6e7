"""Token ids and labels, row by row, against transformers and against the paper's way of feeding.

With DROPLORA_DATA, a folder of public data sets, `pytest -m slow` does so for all of their rows.
"""

from __future__ import annotations

import gzip
import json
import os
from collections import Counter
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import pytest
from data_fixtures import (
    BOS,
    END,
    EOS,
    ROW,
    START,
    loaded,
    make_sentencepiece,
    make_tokenizer,
    write_json,
    write_jsonl,
)

from droplora_jax.core.errors import InputError
from droplora_jax.data.batches import collate
from droplora_jax.data.config import DataConfig, Part
from droplora_jax.data.load import load

IGNORED = -100

TOKENIZERS: dict[str, Callable[..., Any]] = {
    "bytes": make_tokenizer,
    "bytes, pad": lambda **options: make_tokenizer(pad="<pad>", **options),
    "bytes, pad is eos": lambda **options: make_tokenizer(pad=EOS, **options),
    "sentencepiece, legacy": lambda **options: make_sentencepiece(legacy=True, **options),
    "sentencepiece, pad is eos": lambda **options: make_sentencepiece(
        legacy=False, pad=EOS, **options
    ),
}

# --- the data -------------------------------------------------------------------------------------

TOOL = {"name": "find", "description": "Finds é", "parameters": {"type": "object"}}
CALL = {"name": "find", "arguments": {"what": "the answer 日本", "n": [1, 2]}}
SMALL: dict[str, list[dict[str, Any]]] = {
    "alpaca.json": [
        {"instruction": "Is the answer true?", "input": "", "output": "\nthe answer is true 🙂"},
        {"instruction": " Say </s> {it}", "input": "0 1\n2", "output": " it, <s> is</s> "},
        {"instruction": "Nothing", "input": "", "output": ""},
    ],
    "wrapped.json": [
        {
            "instruction": "Below is an instruction that describes a task. Write a response that "
            "appropriately completes the request.\n\n### Instruction:\nAdd.\n\n### Response: Let's "
            "think step by step.",
            "input": "",
            "output": "\\begin{pmatrix} 4 & 2 \\end{pmatrix}",
            "type": "math",
        }
    ],
    "gsm8k.jsonl": [{"question": "2 ducks\u2019 eggs?", "answer": "<<1+1=2>>2\n#### 2"}],
    "HumanEval.jsonl.gz": [
        {"task_id": "0", "prompt": "def f():\n", "canonical_solution": "    return 1\n", "test": ""}
    ],
    "c4.jsonl": [{"text": "Don\u2019t think. "}, {"text": "  日本\n\nthe answer"}],
    "sharegpt.json": [
        {
            "conversations": [
                {"from": "human", "value": " Hi "},
                {"from": "gpt", "value": "Hello 日本!"},
                {"from": "human", "value": "Find it"},
                {"from": "function_call", "value": json.dumps(CALL)},
                {"from": "observation", "value": '{"found": ["the answer"]}'},
                {"from": "gpt", "value": "It is there.\n"},
            ],
            "tools": json.dumps([TOOL]),
        },
        {
            "conversations": [
                {"from": "human", "value": "a"},
                {"from": "gpt", "value": "b"},
                {"from": "human", "value": "c"},
            ],
            "system": "Be kind.",
            "tools": "[]",
        },
    ],
    "mt_bench.jsonl": [{"question_id": 81, "turns": ["a", "b"]}],
}


@pytest.fixture(
    scope="module",
    params=[
        "small",
        pytest.param(
            "full",
            marks=[
                pytest.mark.slow,
                pytest.mark.skipif(
                    "DROPLORA_DATA" not in os.environ, reason="DROPLORA_DATA names no folder"
                ),
            ],
        ),
    ],
)
def paths(request, tmp_path_factory) -> list[str]:
    """Files of data: rows made here, or all that are in a folder."""
    if request.param == "full":
        folder = Path(os.environ["DROPLORA_DATA"])
        return sorted(str(path) for path in folder.iterdir() if path.suffix != ".md")
    folder = tmp_path_factory.mktemp("data")
    for name, rows in SMALL.items():
        if name.endswith(".gz"):
            text = "".join(json.dumps(row) + "\n" for row in rows)
            (folder / name).write_bytes(gzip.compress(text.encode()))
        else:
            (write_jsonl if name.endswith(".jsonl") else write_json)(folder / name, rows)
    return sorted(str(path) for path in folder.iterdir())


def read(path: str) -> list[dict[str, Any]]:
    raw = Path(path).read_bytes()
    raw = gzip.decompress(raw) if path.endswith(".gz") else raw
    if ".jsonl" in path:
        return [json.loads(line) for line in raw.decode().split("\n") if line.strip()]
    return json.loads(raw)


@pytest.fixture(scope="module")
def vocabulary(paths) -> dict[str, Any]:
    """What tokenizers learn from: a part of a large folder, so that they are as large as real ones."""
    raw = [read(path) for path in paths]
    texts = [json.dumps(row, ensure_ascii=False, indent=1) for rows in raw for row in rows[:400]]
    return {"sentences": texts, "vocab_size": 4000} if len(texts) > 1000 else {}


def mapped(path: str) -> dict[str, str]:
    """The columns of a file whose keys are no format's."""
    return {"completion": "canonical_solution"} if "HumanEval" in path else {}


class Expected(NamedTuple):
    ids: list[int]
    labels: list[int]


def assert_equal(path: str, tokenizer: Any, expected: Iterator[Expected], **config: Any) -> int:
    """Compare every row of a file with what is expected of it; returns how many there were."""
    rows, report = load(path, tokenizer, DataConfig(path, max_length=1 << 17, **config))
    assert (report.cut, report.split, report.kept) == (0, 0, len(rows))
    for number, (row, want) in enumerate(zip(rows, expected, strict=True)):
        where, labels = f"{path}, row {number}", np.array([IGNORED, *want.labels[1:]])
        np.testing.assert_array_equal(row.ids, want.ids, where)
        np.testing.assert_array_equal(np.where(row.trained, row.ids, IGNORED), labels, where)
        (targets,) = collate([[row]], len(row) + 1)["targets"]  # the model's, shifted by one
        given = np.where(targets < 0, IGNORED, targets)
        np.testing.assert_array_equal(given, [*labels[1:], IGNORED, IGNORED], where)
    return len(rows)


# --- the paper's way ------------------------------------------------------------------------------

BEGIN = "Below is an instruction that describes a task"
PLAIN = BEGIN + (
    ". Write a response that appropriately completes the request.\n\n"
    "### Instruction:\n%s\n\n### Response:\n"
)
WITH_INPUT = BEGIN + (
    ", paired with an input that provides further context. Write a response that appropriately "
    "completes the request.\n\n### Instruction:\n%s\n\n### Input:\n%s\n\n### Response:\n"
)


def prompt_and_response(row: dict[str, Any]) -> tuple[str, str]:
    match row:
        case {"instruction": str(whole), "output": str(output)} if whole.startswith(BEGIN):
            return whole, output
        case {"instruction": str(task), "input": "", "output": str(output)}:
            return PLAIN % task, output
        case {"instruction": str(task), "input": str(given), "output": str(output)}:
            return WITH_INPUT % (task, given), output
        case {"question": str(question), "answer": str(answer)}:
            return PLAIN % question, answer
        case {"prompt": str(prompt), "canonical_solution": str(solution)}:
            return prompt, solution
    raise AssertionError(row)


def fed(row: dict[str, Any], tokenizer: Any) -> Expected:
    """BOS + prompt + response + EOS, the two tokenised apart, and the loss on the last two."""
    if "text" in row:
        ids = [*tokenizer(row["text"])["input_ids"], tokenizer.eos_token_id]
        return Expected(ids, ids)
    prompt, response = prompt_and_response(row)
    before = tokenizer(prompt)["input_ids"]
    after = tokenizer(response, add_special_tokens=False)["input_ids"] + [tokenizer.eos_token_id]
    return Expected(before + after, [IGNORED] * len(before) + after)


def is_empty(row: dict[str, Any]) -> bool:
    return "output" in row and not row["output"].strip()


@pytest.mark.parametrize("name", TOKENIZERS)
def test_rows_are_what_the_paper_feeds(paths, vocabulary, name):
    tokenizer = TOKENIZERS[name](**vocabulary)
    counts = Counter()
    for path in paths:
        rows = [row for row in read(path) if not is_empty(row)]
        if "conversations" in rows[0]:
            continue  # these have no such form
        if "turns" in rows[0]:
            with pytest.raises(InputError, match="no format has the keys question_id, "):
                load(path, tokenizer, DataConfig(path))
            continue
        expected = (fed(row, tokenizer) for row in rows)
        counts[Path(path).name] = assert_equal(path, tokenizer, expected, columns=mapped(path))
    print(
        f"\n{name} ({len(tokenizer):,} tokens), the paper's way: {counts.total():,} rows equal: {dict(counts)}"
    )
    assert len(counts) == len(paths) - 2


# --- chat templates -------------------------------------------------------------------------------

SPEAKS = "{% generation %}"
SILENT = "{% endgeneration %}"
# Roles in a header, tools in front, calls as JSON in tags.
TAGGED = (
    "{% if tools %}<|start|>system\n{% if messages[0].role == 'system' %}{{ messages[0].content }}"
    "\n{% endif %}{% for tool in tools %}{{ tool | tojson }}\n{% endfor %}<|end|>\n"
    "{% elif messages[0].role == 'system' %}<|start|>system\n{{ messages[0].content }}<|end|>\n"
    "{% endif %}"
    "{% for m in messages %}{% if m.role == 'assistant' %}<|start|>assistant\n"
    "{% generation %}{{ m.content }}{% for call in m.tool_calls %}<call>"
    '{"name": "{{ call.function.name }}", "arguments": {{ call.function.arguments | tojson }}}'
    "</call>{% endfor %}<|end|>{% endgeneration %}{{ '\\n' }}"
    "{% elif m.role != 'system' %}<|start|>{{ m.role }}\n{{ m.content }}<|end|>\n{% endif %}"
    "{% endfor %}{% if add_generation_prompt %}<|start|>assistant\n{% endif %}"
)
# Llama 2's brackets: no header of the assistant's, spaces around, BOS and EOS at every turn.
BRACKETS = (
    "{% for tool in tools or [] %}{{ tool | tojson }}{% endfor %}"
    "{% for m in messages %}{% if m.role == 'assistant' %}"
    "{% generation %} {{ m.content }}{% for call in m.tool_calls %}{{ call.function | tojson }}"
    "{% endfor %} {{ eos_token }}{% endgeneration %}"
    "{% else %}{{ bos_token }}[INST] {{ m.content }} [/INST]{% endif %}{% endfor %}"
)


def chat_of(row: dict[str, Any]) -> tuple[list[dict[str, Any]], list[dict[str, Any]] | None]:
    """The messages and tools of a row, as transformers takes them."""
    if "conversations" in row:
        turns = [{"role": "system", "content": row["system"]}] if row.get("system") else []
        for turn in row["conversations"]:
            role = {"human": "user", "gpt": "assistant", "observation": "tool"}.get(turn["from"])
            if role:
                turns.append({"role": role, "content": turn["value"]})
            else:
                call = {"type": "function", "function": json.loads(turn["value"])}
                turns.append({"role": "assistant", "tool_calls": [call]})
        tools = [{"type": "function", "function": tool} for tool in json.loads(row["tools"])]
        return turns, tools or None
    if "question" in row:
        prompt, response = row["question"], row["answer"]
    elif "canonical_solution" in row:
        prompt, response = row["prompt"], row["canonical_solution"]
    else:
        prompt, response = row["instruction"], row["output"]
        prompt += "\n" + row["input"] if row["input"] else ""
    turns = [{"role": "user", "content": prompt}, {"role": "assistant", "content": response}]
    return turns, None


def applied(row: dict[str, Any], tokenizer: Any, template: str) -> Expected:
    """What apply_chat_template makes of a row."""
    turns, tools = chat_of(row)
    made = tokenizer.apply_chat_template(
        turns,
        tools=tools,
        chat_template=template,
        return_dict=True,
        return_assistant_tokens_mask=True,
        tokenizer_kwargs={"verbose": False},
    )
    ids, mask = made["input_ids"], made["assistant_masks"]
    labels = [id if learnt else IGNORED for id, learnt in zip(ids, mask, strict=True)]
    return Expected(ids, labels)


# Every tokenizer with both templates, every template with and without marks.
CHATS = [
    pytest.param(name, template, (i + j) % 2 == 0, id=f"{name}-{label}")
    for i, name in enumerate(TOKENIZERS)
    for j, (label, template) in enumerate({"tagged": TAGGED, "brackets": BRACKETS}.items())
]


@pytest.mark.parametrize(("name", "template", "marks"), CHATS)
def test_rows_are_what_transformers_makes_of_chats(paths, vocabulary, name, template, marks):
    """Where the template marks what is generated, and where that has to be found out."""
    own = template if marks else template.replace(SPEAKS, "").replace(SILENT, "")
    tokenizer = TOKENIZERS[name](chat_template=own, **vocabulary)
    counts = Counter()
    for path in paths:
        rows = [row for row in read(path) if not is_empty(row)]
        if "turns" in rows[0] or "text" in rows[0]:
            continue  # nobody answers there
        expected = (applied(row, tokenizer, template) for row in rows)
        options = {"template": "chat", "columns": mapped(path)}
        counts[Path(path).name] = assert_equal(path, tokenizer, expected, **options)
    kind = "marked" if marks else "compared"
    print(
        f"\n{name} ({len(tokenizer):,} tokens), chat, {kind}: {counts.total():,} rows equal: {dict(counts)}"
    )
    assert len(counts) == len(paths) - 2


def test_the_end_of_every_answer_is_learnt_and_nothing_of_the_user(paths):
    """The labels above, decoded: neither transformers nor this says what it should be."""
    path = next(path for path in paths if "sharegpt" in path)
    for make in TOKENIZERS.values():
        tokenizer = make(chat_template=TAGGED)
        rows, _ = load(path, tokenizer, DataConfig(path, max_length=1 << 17))
        for row, record in zip(rows, read(path), strict=True):
            said = [m for m in record["conversations"] if m["from"] in ("gpt", "function_call")]
            learnt = tokenizer.decode(row.ids[row.trained])
            assert learnt.count(END) == len(said)
            assert START not in learnt
            assert len(learnt.split(END)) == len(said) + 1
            assert learnt.endswith(END)


def test_loading_does_not_depend_on_the_chunk(tmp_path, monkeypatch):
    tokenizer = make_tokenizer()
    data = [{"prompt": f"{i} the", "completion": "true" * (i % 5 + 1)} for i in range(20)]
    rows, report = loaded(tmp_path, data, tokenizer)
    monkeypatch.setattr("droplora_jax.data.load._RECORDS", 7)
    again, same = loaded(tmp_path, data, tokenizer)
    assert report == same
    for i, (one, other) in enumerate(zip(rows, again, strict=True)):
        assert tokenizer.decode(one.ids) == f"{BOS}{i} the{'true' * (i % 5 + 1)}{EOS}"
        np.testing.assert_array_equal(one.ids, other.ids)
        np.testing.assert_array_equal(one.trained, other.trained)


def test_several_files_each_of_its_own_format(tmp_path):
    paths = (
        write_json(tmp_path / "a.json", [ROW, ROW]),
        write_jsonl(tmp_path / "b.jsonl", [{"text": "plain"}]),
    )
    rows, report = load(paths, make_tokenizer(), DataConfig(train=paths))
    assert len(rows) == report.read == 3
    assert [(s.path, s.format, s.template, s.records) for s in report.sources] == [
        (paths[0], "alpaca", "alpaca", 2),
        (paths[1], "text", "none", 1),
    ]
    assert len({s.sha256 for s in report.sources}) == 2
    assert len(load(tmp_path / "a.json", make_tokenizer(), DataConfig(train="x"))[0]) == 2


def test_each_source_may_have_a_format_columns_and_a_template_of_its_own(tmp_path):
    paths = [write_json(tmp_path / f"{i}.json", [{"q": "a", "a": "b"}]) for i in range(2)]
    own = Part(paths[1], format="prompt_completion", columns={"prompt": "q", "completion": "a"})
    config = DataConfig(
        train=(
            write_json(tmp_path / "c.json", [ROW]),
            own,
            Part(paths[0], format="question_answer"),
        ),
        columns={},
    )
    with pytest.raises(InputError, match="question is missing"):
        load(config.train, make_tokenizer(), config)
    rows, report = load(config.train[:2], make_tokenizer(), config)
    assert [source.format for source in report.sources] == ["alpaca", "prompt_completion"]
    assert rows.counts == [1, 1]
    assert config.weights is None
    assert DataConfig(train=(Part("a", 2.0), Part("b", 1.0))).weights == (2.0, 1.0)
