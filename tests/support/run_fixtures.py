"""A tiny base with a tokenizer, rows to learn, and the command line run on them."""

from __future__ import annotations

import hashlib
import json
import os
import socket
import subprocess
import sys
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import jax
import numpy as np
import pytest
import torch
from data_fixtures import make_tokenizer, write_jsonl
from oracles import Folder, model_folder
from ruamel.yaml import YAML
from safetensors.numpy import load_file

from droplora_jax import cli

VOCAB = 344
LENGTH = 72

# Short, on all eight devices, with every feature that could depend on what ran before.
SETTINGS: dict[str, Any] = {
    "model": {"dtype": "float32"},
    "seed": 7,
    "adapter": {"rank": 4, "alpha": 8.0},
    "data": {"max_length": LENGTH},
    "optim": {"learning_rate": 0.02, "warmup_steps": 2},
    "train": {
        "steps": 12,
        "global_batch": 16,
        "micro_batch": 8,
        "eval_every": 4,
        "save_every": 4,
        "log_every": 1,
    },
}


def make_base(path: Path, *, dtype: torch.dtype = torch.float32, **overrides: Any) -> Folder:
    """A Hugging Face folder with weights in several shards and a tokenizer."""
    base = model_folder(
        path,
        dtype=dtype,
        **{
            "vocab_size": VOCAB,
            "num_hidden_layers": 2,
            "max_position_embeddings": 128,
            **overrides,
        },
    )
    make_tokenizer().save_pretrained(path)
    return base


def rows(count: int, seed: int = 0) -> list[dict[str, str]]:
    """Questions whose answers can be learnt; with and without an input."""
    random = np.random.default_rng(seed)
    made = []
    for number in random.integers(0, 1000, count).tolist():
        answer = "true" if number % 2 else "false"
        row = {"instruction": f"odd? {number}", "output": f"the answer is {answer}"}
        made.append(row | ({"input": "now"} if number % 5 == 0 else {}))
    return made


def write_data(folder: Path) -> tuple[str, str]:
    folder.mkdir(exist_ok=True)
    train = write_jsonl(folder / "train.jsonl", rows(40, seed=1))
    return train, write_jsonl(folder / "valid.jsonl", rows(10, seed=2))


def settings(base: Path | str, folder: Path, **sections: Any) -> dict[str, Any]:
    """A run's configuration that works, with other values in its sections.

    Rows and the output go into `folder`; a value of `...` takes a key out.
    """
    train, valid = write_data(folder / "data")
    tree = _updated(SETTINGS, {"model": {"path": str(base)}, "output": str(folder / "run")})
    tree = _updated(tree, {"data": {"train": train, "valid": valid}})
    return _updated(tree, sections)


def _updated(tree: Mapping[str, Any], changes: Mapping[str, Any]) -> dict[str, Any]:
    new = dict(tree)
    for key, value in changes.items():
        if value is ...:
            new.pop(key)
        elif isinstance(value, Mapping) and isinstance(tree.get(key), Mapping):
            new[key] = _updated(tree[key], value)
        else:
            new[key] = value
    return new


def write_run(base: Path | str, folder: Path, **sections: Any) -> Path:
    """The same as a YAML file in `folder`."""
    return write_yaml(folder / "run.yaml", settings(base, folder, **sections))


def write_yaml(file: Path, tree: Mapping[str, Any]) -> Path:
    with file.open("w", encoding="utf-8") as out:
        YAML(typ="safe", pure=True).dump(dict(tree), out)
    return file


@dataclass(frozen=True)
class Result:
    code: int
    out: str
    err: str


class CommandLine:
    """Runs `droplora` in this process."""

    def __init__(self, capsys: pytest.CaptureFixture[str]) -> None:
        self.capsys = capsys

    def __call__(self, *arguments: object) -> Result:
        self.capsys.readouterr()
        code = cli.main([str(argument) for argument in arguments])
        captured = self.capsys.readouterr()
        return Result(code, captured.out, captured.err)

    def good(self, *arguments: object) -> str:
        """What a command that ends well says."""
        result = self(*arguments)
        assert result.code == 0, result.err
        assert result.err == ""
        return result.out


def process(
    *arguments: object, devices: int = 8, program: Sequence[str] = ("-m", "droplora_jax.cli")
) -> subprocess.Popen[str]:
    """`droplora` in a process of its own, on as many simulated devices."""
    environment = os.environ | {
        "XLA_FLAGS": f"{os.environ['XLA_FLAGS']} --xla_force_host_platform_device_count={devices}",
        "JAX_COMPILATION_CACHE_DIR": str(jax.config.jax_compilation_cache_dir),
        "JAX_PERSISTENT_CACHE_MIN_COMPILE_TIME_SECS": "0",
        "JAX_PERSISTENT_CACHE_MIN_ENTRY_SIZE_BYTES": "0",
    }
    return subprocess.Popen(
        [sys.executable, *program, *map(str, arguments)],
        env=environment,
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
    )


def processes(count: int, *arguments: object, devices: int = 4) -> list[subprocess.Popen[str]]:
    """`droplora` in several processes that share the devices."""
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    joined = (f"distributed.coordinator=127.0.0.1:{port}", f"distributed.num_processes={count}")
    return [
        process(*arguments, *joined, f"distributed.process_id={i}", devices=devices // count)
        for i in range(count)
    ]


def metrics(run: Path) -> list[dict[str, Any]]:
    """The rows of a run's metrics.jsonl, every one of them whole."""
    text = (run / "metrics.jsonl").read_text(encoding="utf-8")
    assert text.endswith("\n")
    return [json.loads(line) for line in text.splitlines()]


def adapter_bytes(run: Path) -> dict[str, bytes]:
    return {file.name: file.read_bytes() for file in sorted((run / "adapter").iterdir())}


def factors(folder: Path) -> dict[str, np.ndarray]:
    """The tensors of an adapter in PEFT's format."""
    return load_file(folder / "adapter_model.safetensors")


def contents(folder: Path) -> dict[str, str]:
    """Every file below a folder with a digest of its bytes, and every folder."""
    return {
        str(path.relative_to(folder)): (
            hashlib.sha256(path.read_bytes()).hexdigest() if path.is_file() else "folder"
        )
        for path in sorted(folder.rglob("*"))
    }
