"""`droplora generate`: files that are whole, in order and never overwritten; and a chat."""

from __future__ import annotations

import json
import os
from pathlib import Path
from types import SimpleNamespace

import pytest
from data_fixtures import CHATML, make_tokenizer, write_jsonl
from run_fixtures import contents, make_base

from droplora_jax.commands.completions import prompt_document, unused_template
from droplora_jax.core.partial_output import Partial
from droplora_jax.data.formats.base import Turn
from droplora_jax.data.tokenization import encode_prompts
from droplora_jax.inference.config import Sampling
from droplora_jax.inference.generator import Generator
from droplora_jax.runs.open_model import open_model

PROMPTS = [f"Is {n} odd?" for n in range(20)]
SHORT = ("--max-new-tokens", 6)


@pytest.fixture(scope="module")
def base(tmp_path_factory) -> Path:
    folder = make_base(tmp_path_factory.mktemp("base")).path
    make_tokenizer(chat_template=CHATML).save_pretrained(folder)
    return folder


@pytest.fixture
def prompts(tmp_path) -> str:
    return write_jsonl(tmp_path / "prompts.jsonl", [{"prompt": p, "more": 1} for p in PROMPTS])


@pytest.fixture(scope="module")
def generator(base) -> Generator:
    opened = open_model(str(base))
    return Generator(opened.model, opened.tokenizer)


def rows_of(file: Path) -> list[dict[str, str]]:
    return [json.loads(line) for line in file.read_text(encoding="utf-8").splitlines()]


def test_a_file_of_prompts(droplora, base, prompts, tmp_path, generator):
    output = tmp_path / "deep" / "out.jsonl"
    out = droplora.good("generate", base, "--prompts", prompts, "--output", output, *SHORT)
    assert f"20 completions: {output}" in out
    assert "taken as they are; the tokenizer has a chat template, which --template chat" in out
    completions = generator(PROMPTS, Sampling(6))
    assert rows_of(output) == [
        {"prompt": p, "completion": c} for p, c in zip(PROMPTS, completions, strict=True)
    ]
    assert [file.name for file in output.parent.iterdir()] == ["out.jsonl"]


def test_what_was_written_is_carried_on(droplora, base, prompts, tmp_path, monkeypatch):
    """After an interrupt in the middle, and half a row: the same rows as in one go."""
    drawn = ("--temperature", 1, "--top-k", 50, "--seed", 5, *SHORT)
    whole, output = tmp_path / "whole.jsonl", tmp_path / "out.jsonl"
    command = ("generate", base, "--prompts", prompts, *drawn, "--batch-size", 8)
    droplora.good(*command, "--output", whole)
    monkeypatch.setattr("droplora_jax.commands.completions.WINDOW", 1)
    as_done = Generator.as_done

    def interrupted(self, prompts, sampling, *, rows):
        if rows[0] >= 8:
            raise KeyboardInterrupt
        return as_done(self, prompts, sampling, rows=rows)

    monkeypatch.setattr(Generator, "as_done", interrupted)
    assert droplora(*command, "--output", output).code == 130
    monkeypatch.undo()
    part = tmp_path / "out.jsonl.part"
    assert not output.exists()
    assert len(rows_of(part)) == 1 + 8
    with part.open("a") as file:
        file.write('{"prompt": "Is')
    other = [*command[:-1], 16, "--output", output]  # another batch size changes nothing
    assert "carries on after 8 of 20" in droplora.good(*other)
    assert output.read_bytes() == whole.read_bytes()
    assert not part.exists()


def test_a_part_of_another_command(droplora, base, prompts, tmp_path):
    output = tmp_path / "out.jsonl"
    part = tmp_path / "out.jsonl.part"
    command = ("generate", base, "--prompts", prompts, "--output", output)
    part.write_text('{"prompt": "a", "completion": "b"}\n')
    before = contents(tmp_path)
    result = droplora(*command)
    assert (result.code, contents(tmp_path)) == (2, before)
    assert "was not begun by this command" in result.err
    begun = [{"settings": {"max_new_tokens": 3}}, {"prompt": "a", "completion": "b"}]
    part.write_text("".join(json.dumps(line) + "\n" for line in begun))
    before = contents(tmp_path)
    result = droplora(*command)
    assert (result.code, contents(tmp_path)) == (2, before)
    assert "max_new_tokens: 3 -> 256" in result.err


def test_a_part_of_another_model_in_the_same_folder(droplora, prompts, tmp_path, monkeypatch):
    base = make_base(tmp_path / "base").path
    command = ("generate", base, "--prompts", prompts, *SHORT, "--output", tmp_path / "out.jsonl")
    monkeypatch.setattr(Partial, "remove", lambda self: None)
    monkeypatch.setattr("droplora_jax.commands.completions.write_file", lambda *arguments: None)
    droplora.good(*command)
    weights = min(base.glob("*.safetensors"))
    os.utime(weights, ns=(0, 0))
    result = droplora(*command)
    assert result.code == 2
    assert "files: " in result.err


def test_a_template_that_is_not_put_around_prompts_is_named():
    def said(recorded, chat_template=None):
        return unused_template(recorded, SimpleNamespace(chat_template=chat_template))

    assert "trained with template alpaca, which --template recorded" in said("alpaca", CHATML)
    assert "has a chat template, which --template chat" in said(None, CHATML)
    assert said("none", CHATML) is said(None) is None


def test_a_template_around_every_prompt(base, prompts, droplora, tmp_path, generator):
    output = tmp_path / "out.jsonl"
    command = ("generate", base, "--prompts", prompts, "--output", output, *SHORT)
    assert "as they are" not in droplora.good(*command, "--template", "chat")
    tokenizer = generator.tokenizer
    texts = [
        tokenizer.apply_chat_template(
            [{"role": "user", "content": prompt}], tokenize=False, add_generation_prompt=True
        )
        for prompt in PROMPTS
    ]
    ids = tokenizer(texts, add_special_tokens=False).input_ids
    expected = generator(ids, Sampling(6))
    assert [row["completion"] for row in rows_of(output)] == expected
    assert expected != generator(PROMPTS, Sampling(6))


@pytest.mark.parametrize("template", ["alpaca", "chat", "none"])
def test_a_prompt_is_what_comes_before_the_response_in_training(base, template):
    from droplora_jax.data.formats.base import Example
    from droplora_jax.data.templates import TEMPLATES
    from droplora_jax.data.tokenization import encode

    tokenizer = make_tokenizer(chat_template=CHATML)
    turns = [Turn("user", "odd? 7")]
    (ids,) = encode_prompts([prompt_document(turns, template, tokenizer)], tokenizer)
    trained = TEMPLATES[template](Example((*turns, Turn("assistant", "true"))), tokenizer)
    (row,) = encode([trained], tokenizer)
    assert ids == row.ids[: list(row.trained).index(True)].tolist()


# --- bad input ------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("rows", "message"),
    [
        ([{"prompt": "a"}, {"text": "b"}], "prompts.jsonl:2: prompt is missing"),
        ([{"prompt": ["a"]}], "prompts.jsonl:1: prompt must be text"),
        ([{"prompt": ""}], "prompts.jsonl:1: prompt is empty"),
        ([{"prompt": "a"}, {"prompt": "b " * 100}], "prompts.jsonl:2: its 20"),
        ([], "prompts.jsonl: the file is empty"),
    ],
)
def test_rows_that_are_none(droplora, base, tmp_path, rows, message):
    file = write_jsonl(tmp_path / "prompts.jsonl", rows)
    before = contents(tmp_path)
    result = droplora("generate", base, "--prompts", file, "--output", tmp_path / "o.jsonl", *SHORT)
    assert (result.code, contents(tmp_path)) == (2, before)
    assert message in result.err


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (("--output", "x"), "--prompts and --output go together"),
        (("--template", "vicuna"), "--template vicuna: must be one of alpaca"),
        (("--temperature", "-1"), "temperature=-1.0: must be"),
        (("--batch-size", "0"), "--batch-size 0: must be at least 1"),
        (("--template", "recorded"), "no template is recorded with this model"),
        (("--adapter", "/nowhere"), "/nowhere"),
    ],
)
def test_options_that_make_no_sense(droplora, base, arguments, message):
    result = droplora("generate", base, *arguments)
    assert result.code == 2
    assert message in result.err


def test_an_output_that_is_there(droplora, base, prompts, tmp_path):
    output = tmp_path / "out.jsonl"
    output.write_text("mine\n")
    result = droplora("generate", base, "--prompts", prompts, "--output", output)
    assert (result.code, output.read_text()) == (2, "mine\n")
    assert "out.jsonl: exists; nothing is overwritten" in result.err


# --- a chat ---------------------------------------------------------------------------------------


def typed(monkeypatch, *lines: str) -> None:
    waiting = iter(lines)

    def answer(_: str) -> str:
        if (line := next(waiting, None)) is None:
            raise EOFError
        return line

    monkeypatch.setattr("builtins.input", answer)


def test_a_chat_remembers_what_was_said(droplora, base, generator, monkeypatch):
    def reply(*turns: tuple[str, str]) -> str:
        document = prompt_document([Turn(*turn) for turn in turns], "chat", generator.tokenizer)
        return generator(encode_prompts([document], generator.tokenizer), Sampling(6))[0]

    first = reply(("user", "hello"))
    second = reply(("user", "hello"), ("assistant", first), ("user", "and?"))
    again = reply(("user", "and?"))
    assert len({first, second, again}) == 3
    typed(monkeypatch, "hello", "", "and?", "/clear", "and?", "/exit", "never read")
    out = droplora.good("generate", base, *SHORT)
    said = out.split("stops an answer\n", 1)[1]
    assert said == f"{first}\n{second}\n{again}\n"


def test_a_template_of_one_exchange_answers_each_message_by_itself(
    droplora, base, generator, monkeypatch
):
    document = prompt_document([Turn("user", "and?")], "alpaca", generator.tokenizer)
    ids = encode_prompts([document], generator.tokenizer)
    answer = generator(ids, Sampling(4))[0]
    typed(monkeypatch, "and?", "and?")
    out = droplora.good("generate", base, "--template", "alpaca", "--max-new-tokens", 4)
    assert "every message is answered by itself" in out
    assert out.rstrip("\n").endswith(f"{answer}\n{answer}")


def test_a_conversation_that_grows_too_long_can_begin_anew(droplora, base, monkeypatch):
    typed(monkeypatch, "x " * 100, "hello")
    out = droplora.good("generate", base, *SHORT)
    assert "more than 128" in out
    assert "/clear begins a new conversation" in out


def test_an_interrupt_stops_the_answer_alone(droplora, base, monkeypatch):
    import signal

    asked = []

    def stream(self, ids, sampling):
        asked.append(len(ids))
        yield "begun"
        signal.raise_signal(signal.SIGINT)
        yield ", stopped"
        raise AssertionError("goes on")

    monkeypatch.setattr(Generator, "stream", stream)
    typed(monkeypatch, "hello", "more")
    out = droplora.good("generate", base, *SHORT)
    assert out.endswith("begun, stopped\nbegun, stopped\n\n")
    assert asked[1] > asked[0]  # what was said is remembered
