"""Completions of the prompts in a file, and the templates that are put around a prompt."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Iterator, Sequence
from dataclasses import asdict
from pathlib import Path
from typing import Any

from rich.console import Console

from droplora_jax.commands.options import ModelRef
from droplora_jax.core.console import Advance, progress, say
from droplora_jax.core.errors import InputError
from droplora_jax.core.files import check_absent, write_file
from droplora_jax.core.partial_output import Partial
from droplora_jax.data.data_file import local
from droplora_jax.data.formats.base import ASSISTANT, USER, Example, Turn, text_of
from droplora_jax.data.templates import TEMPLATES
from droplora_jax.data.templates.base import Document, Piece
from droplora_jax.data.tokenization import encode_prompts
from droplora_jax.inference.config import Sampling
from droplora_jax.inference.generator import Generator
from droplora_jax.runs.open_model import ModelFiles, Opened

RECORDED = "recorded"  # in place of a template's name
WINDOW = 16  # batches whose prompts are sorted by length together


# --- a file ---------------------------------------------------------------------------------------


def complete_file(
    prompts: Path,
    output: Path,
    source: ModelRef,
    sampling: Sampling,
    *,
    template: str | None,
    batch_size: int,
    console: Console,
) -> None:
    """Complete every row `{"prompt"}` of a file; writes rows `{"prompt", "completion"}`, in order.

    Until all are there they are in `OUTPUT.part`, from which the same command carries on. Nothing
    that was written is overwritten.

    Raises:
      InputError: the output exists, a row without a prompt, a part of another command's.
    """
    check_absent(output)
    rows = _read(prompts)
    files = source.find()
    partial = Partial(output, _settings(source, files, template, sampling, [p for _, p in rows]))
    done = len(partial.rows)
    if done:
        say(console, f"carries on after {done} of {len(rows)} completions ({partial.file})")
    opened = source.load(files)
    if template is None and (hint := unused_template(opened.template, opened.tokenizer)):
        say(console, hint)
    generator = Generator(opened.model, opened.tokenizer, batch_size=batch_size)
    ids = _encoded(rows, chosen_template(template, opened), opened.tokenizer)
    _check_all(generator, rows, ids, sampling)
    with progress(console, "prompt", total=len(rows), done=done) as advance:
        for first in range(done, len(rows), WINDOW * generator.batch_size):
            window = range(first, min(first + WINDOW * generator.batch_size, len(rows)))
            completions = generator.as_done([ids[i] for i in window], sampling, rows=list(window))
            for i, text in _in_order(completions, advance):
                partial.write({"prompt": rows[window[i]][1], "completion": text})
    lines = (json.dumps(row, ensure_ascii=False) + "\n" for row in partial.rows)
    write_file(output, "".join(lines))
    partial.remove()
    say(console, f"{len(rows)} completions: {output}")


def _read(file: Path) -> list[tuple[str, str]]:
    """Every row's place, for errors, and its prompt."""
    rows = []
    for where, record in local(file).records():
        try:
            rows.append((where, text_of(record, "prompt")))
        except InputError as error:
            raise InputError(f"{where}: {error}") from error
    return rows


def _encoded(
    rows: Sequence[tuple[str, str]], template: str | None, tokenizer: Any
) -> list[list[int]]:
    documents = []
    for where, prompt in rows:
        try:
            documents.append(prompt_document([Turn(USER, prompt)], template, tokenizer))
        except InputError as error:
            raise InputError(f"{where}: {error}") from error
    return encode_prompts(documents, tokenizer)


def _check_all(
    generator: Generator,
    rows: Sequence[tuple[str, str]],
    ids: Sequence[Sequence[int]],
    sampling: Sampling,
) -> None:
    for (where, _), own in zip(rows, ids, strict=True):
        generator.check(where, own, sampling)


def _settings(
    source: ModelRef,
    files: ModelFiles,
    template: str | None,
    sampling: Sampling,
    prompts: Sequence[str],
) -> dict[str, Any]:
    """What makes the completions: all but the batch size."""
    settings = {**asdict(source), "template": template, **asdict(sampling)}
    digest = hashlib.sha256(json.dumps(prompts).encode()).hexdigest()
    return {**settings, "files": files.fingerprint(), "prompts": digest}


def _in_order(
    completions: Iterator[tuple[int, str]], advance: Advance
) -> Iterator[tuple[int, str]]:
    """Each as soon as those before it are there."""
    waiting: dict[int, str] = {}
    following = 0
    for i, text in completions:
        waiting[i] = text
        advance()
        while following in waiting:
            yield following, waiting.pop(following)
            following += 1


# --- prompts --------------------------------------------------------------------------------------


def prompt_document(turns: Sequence[Turn], template: str | None, tokenizer: Any) -> Document:
    """A conversation that the assistant is to go on with, as it was written out for training."""
    if template is None:
        return Document((Piece(turns[-1].content or "", False),))
    # The template knows best where a response begins: `encode_prompts` takes what is before it.
    answered = Example((*turns, Turn(ASSISTANT, "answer")))
    return TEMPLATES[template](answered, tokenizer)


def unused_template(recorded: str | None, tokenizer: Any) -> str | None:
    """What to say where prompts are taken as they are by a model that knows them in a template.

    Args:
      recorded: the template that an adapter was trained with; None where none is recorded.
    """
    if recorded == "none":
        return None
    if recorded is not None:
        known, name = f"this model was trained with template {recorded}", RECORDED
    elif tokenizer.chat_template:
        known, name = "the tokenizer has a chat template", "chat"
    else:
        return None
    return f"the prompts are taken as they are; {known}, which --template {name} puts around them"


def check_template(name: str | None) -> None:
    names = (*TEMPLATES, RECORDED)
    if name is not None and name not in names:
        raise InputError(f"--template {name}: must be one of {', '.join(names)}")


def chosen_template(asked: str | None, opened: Opened) -> str | None:
    if asked != RECORDED:
        return asked
    if opened.template is None:
        raise InputError(
            f"--template {RECORDED}: no template is recorded with this model (droplora_config.json "
            f"of an adapter has one); name one of {', '.join(TEMPLATES)}"
        )
    return opened.template
