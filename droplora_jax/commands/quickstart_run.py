"""Fine-tune, export and check the small base model of the quickstart.

The base (`quickstart_base/`, made by `examples/quickstart/make_base.py`) has read statements about
made-up words and numbers and has never seen a question. A short fine-tuning run teaches it to
answer; then both formats are exported, and the merged model is checked against base + adapter.
"""

from __future__ import annotations

import json
import random
from pathlib import Path
from typing import Any

import jax.numpy as jnp
import numpy as np
from rich.console import Console
from rich.table import Table

from droplora_jax.adapters.droplora import DropLoRA
from droplora_jax.core.console import say
from droplora_jax.core.files import check_free, read_json
from droplora_jax.core.sharding import make_mesh
from droplora_jax.data.config import DataConfig
from droplora_jax.hf.base import Base
from droplora_jax.hf.companions import REPORT_FILE
from droplora_jax.hf.merged import save_merged
from droplora_jax.hf.peft.adapter import load_adapter
from droplora_jax.inference.config import Sampling
from droplora_jax.inference.generator import Generator
from droplora_jax.runs import train_run
from droplora_jax.runs.config import BaseConfig, RunConfig
from droplora_jax.training.config import OptimConfig, TrainConfig

LENGTH = 64  # longer than any question with its answer
ANSWER_LENGTH = 8


def demonstrate(base_folder: Path, folder: Path, console: Console) -> None:
    """Fine-tune, export and check, everything in `folder`; carries on if it was interrupted.

    Raises:
      InputError: the folder holds something else, or the merged model is not base + adapter.
    """
    config = run_config(base_folder, folder)
    if not Path(config.output).exists():
        check_free(folder)
    questions = write_data(folder / "data")
    base = Base.open(base_folder)
    tokenizer, mesh = base.tokenizer, make_mesh(config.mesh)
    model = base.load(mesh, dtype=jnp.float32)
    before = answers(model, tokenizer, questions)

    adapter = train_run.train_run(config, console)
    tuned = load_adapter(model, adapter)
    after = answers(tuned, tokenizer, questions)
    show_answers(console, questions, before, after)

    merged = folder / "merged"
    if not merged.exists():
        say(console, str(save_merged(tuned, merged)))
    difference = read_json(merged / REPORT_FILE)["logits_difference"]
    say(
        console,
        f"merged model: {merged} (logits equal base + adapter to {difference:.0e})\n"
        f"adapter for PEFT: {adapter}",
    )


def run_config(base: Path, folder: Path) -> RunConfig:
    """The run as its YAML would say it."""
    return RunConfig(
        model=BaseConfig(path=str(base), dtype="float32"),
        output=str(folder / "run"),
        data=DataConfig(
            train=str(folder / "data" / "train.jsonl"),
            valid=str(folder / "data" / "valid.jsonl"),
            max_length=LENGTH,
        ),
        adapter=DropLoRA(rank=16, alpha=32.0, drop_rate=0.2),
        optim=OptimConfig(learning_rate=4e-3, warmup_steps=10, weight_decay=0.0),
        train=TrainConfig(
            steps=200,
            global_batch=64,
            eval_every=50,
            save_every=50,
            log_every=25,
            remat="everything",
        ),
    )


# --- the task ------------------------------------------------------------------------------------


def random_word(rng: random.Random) -> str:
    return "".join(rng.choice("abcdefghijklmnopqrstuvwxyz") for _ in range(rng.randint(3, 6)))


def random_number(rng: random.Random) -> int:
    return rng.randint(10, 9999)


def random_question(rng: random.Random) -> dict[str, str]:
    word, number = random_word(rng), random_number(rng)
    return rng.choice(
        (
            {"prompt": f"What does {word} begin with? ", "completion": word[0]},
            {"prompt": f"What does {word} end with? ", "completion": word[-1]},
            {"prompt": f"Spell {word} backwards: ", "completion": word[::-1]},
            {"prompt": f"Write {word} in capitals: ", "completion": word.upper()},
            {"prompt": f"Is {number} odd or even? ", "completion": ("even", "odd")[number % 2]},
        )
    )


def write_data(folder: Path) -> list[dict[str, str]]:
    """Write training and validation files; returns held-out questions that are in neither."""
    rng = random.Random(0)
    distinct: dict[str, dict[str, str]] = {}
    while len(distinct) < 4400:
        row = random_question(rng)
        distinct.setdefault(row["prompt"], row)
    rows = list(distinct.values())
    folder.mkdir(parents=True, exist_ok=True)
    for name, part in (("train", rows[:4000]), ("valid", rows[4000:4200])):
        lines = "".join(json.dumps(row) + "\n" for row in part)
        (folder / f"{name}.jsonl").write_text(lines, encoding="utf-8")
    return rows[4200:]


# --- looking at what was learnt ------------------------------------------------------------------


def answers(model: Any, tokenizer: Any, questions: list[dict[str, str]]) -> list[str]:
    """Greedy answers."""
    generator = Generator(model, tokenizer, batch_size=len(questions))
    sampling = Sampling(max_new_tokens=ANSWER_LENGTH)
    return generator([row["prompt"] for row in questions], sampling)


def show_answers(
    console: Console, questions: list[dict[str, str]], before: list[str], after: list[str]
) -> None:
    """A few held-out questions with both answers, and the accuracy on all of them."""
    table = Table(title=f"{len(questions)} held-out questions", title_justify="left")
    for column in ("question", "right answer", "before", "after"):
        table.add_column(column)
    for row, *given in list(zip(questions, before, after, strict=True))[:6]:
        table.add_row(row["prompt"].strip(), row["completion"], *map(repr, given))
    right = [
        np.mean([row["completion"] == text for row, text in zip(questions, given, strict=True)])
        for given in (before, after)
    ]
    table.add_section()
    table.add_row("accuracy", "", *(f"{value:.1%}" for value in right))
    console.print(table)
