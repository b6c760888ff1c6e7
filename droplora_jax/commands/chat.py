"""A plain chat in the terminal: `droplora generate` without a file."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from typing import Any

from rich.console import Console

from droplora_jax.commands.completions import chosen_template, generator_of, prompt_document
from droplora_jax.commands.options import ModelRef
from droplora_jax.core import signals
from droplora_jax.core.console import say
from droplora_jax.core.errors import InputError
from droplora_jax.data.formats.base import ASSISTANT, USER, Turn
from droplora_jax.data.tokenization import encode_prompts
from droplora_jax.inference.config import Sampling
from droplora_jax.inference.generator import Generator
from droplora_jax.runs.open_model import Opened


def chat(source: ModelRef, template: str | None, sampling: Sampling, console: Console) -> None:
    """Answer what is typed, until `/exit` or the end of the input; Ctrl-C stops an answer."""
    import readline  # noqa: F401 - lines can be edited, and come back

    opened = source.load(source.find())
    template = _template(template, opened)
    example = prompt_document([Turn(USER, "Hello")], template, opened.tokenizer)
    generator = generator_of(opened, [example], batch_size=1)
    remembers = template == "chat"
    say(console, f"template: {template or 'none'}; {_help(remembers)}")
    turns: list[Turn] = []
    while (line := _asked()) not in (None, "/exit"):
        if line == "/clear":
            turns = []
        elif line:
            turns = [*turns, Turn(USER, line)] if remembers else [Turn(USER, line)]
            try:
                answer = _answer(turns, template, opened.tokenizer, generator, sampling)
                turns = [*turns, Turn(ASSISTANT, answer)] if answer else turns[:-1]
            except InputError as error:
                turns = turns[:-1]
                say(console, f"{error}\n(/clear begins a new conversation)")


def _help(remembers: bool) -> str:
    memory = "/clear forgets" if remembers else "every message is answered by itself"
    return f"{memory}, /exit ends, Ctrl-C stops an answer"


def _asked() -> str | None:
    try:
        return input("> ").strip()
    except EOFError:
        print()
        return None
    except KeyboardInterrupt:
        print()
        return ""


def _answer(
    turns: Sequence[Turn],
    template: str | None,
    tokenizer: Any,
    generator: Generator,
    sampling: Sampling,
) -> str:
    """Prints the answer as it comes; returns what there is of it."""
    document = prompt_document(turns, template, tokenizer)
    (ids,) = encode_prompts([document], tokenizer)
    room = generator.longest - len(ids)
    if 0 < room < sampling.max_new_tokens:
        sampling = replace(sampling, max_new_tokens=room)
    said = ""
    with signals.collected(0.0, lambda: "terminated") as received:
        for piece in generator.stream(ids, sampling):
            print(piece, end="", flush=True)
            said += piece
            if received:
                break
    print()
    return said


def _template(asked: str | None, opened: Opened) -> str | None:
    """What was asked for, else what the adapter was trained with, else the tokenizer's own."""
    if asked is not None:
        return chosen_template(asked, opened)
    own = "chat" if opened.tokenizer.chat_template else None
    return opened.template or own
