"""How long `droplora train` takes to its first step, the first time and the second.

The first start finds no cache of compiled programs or tokenised rows, the second the ones that it
left. Both find the weights and the Python packages in the page cache.
"""

from __future__ import annotations

import argparse
import json
import os
import shutil
import subprocess
import sys
import time
from pathlib import Path

import numpy as np
from instructions import train_tokenizer
from work import SHAPES, write_config, write_weights

FIRST_STEP = "step 1/"  # how the line begins that a run prints after it
AIM = 0.3  # of the first start, at most


def run(folder: Path, args: argparse.Namespace) -> None:
    """Start twice, as many times as there are rounds, and report the ratio."""
    file = write_run(folder, args)
    print(
        f"\nstartup: {SHAPES[args.shape or 'dense'].parameters / 1e6:,.1f}M parameters", flush=True
    )
    looked = start(file, folder / "looking", "--dry-run")  # reads every package once
    print(f"  imports and data alone (--dry-run): {looked:.1f} s", flush=True)
    seconds: dict[str, list[float]] = {"first": [], "second": []}
    for number in range(args.rounds or 3):
        cache = folder / f"cache{number}"
        for name in seconds:
            output = folder / f"{name}{number}"
            seconds[name].append(start(file, cache, f"output={output}"))
            shutil.rmtree(output)
        print(
            f"  first {seconds['first'][-1]:.1f} s, second {seconds['second'][-1]:.1f} s",
            flush=True,
        )
    first, second = (np.array(own) for own in seconds.values())
    by_round = second / first
    ratio = float(np.median(by_round))
    what = "| time to first step, second start / first | "
    verdict = f"at most {AIM}: {'met' if ratio <= AIM else 'not met'}"
    print("\n| what | ratio (min..max of rounds) | aim |\n|---|---|---|")
    print(f"{what}{ratio:.2f} ({by_round.min():.2f}..{by_round.max():.2f}) | {verdict} |")
    record = {"part": "startup", "seconds": seconds, "dry_run_seconds": looked, "ratio": ratio}
    args.output.mkdir(parents=True, exist_ok=True)
    (args.output / "startup.json").write_text(json.dumps(record, indent=2) + "\n")


def write_run(folder: Path, args: argparse.Namespace) -> Path:
    """A base with a tokenizer, rows, and the YAML of a short run on them."""
    shape, base, data = SHAPES[args.shape or "dense"], folder / "base", folder / "rows.json"
    base.mkdir()
    write_config(base, shape)
    write_weights(base, shape)
    rows = [
        {"instruction": f"Count from {n}.", "output": " ".join(map(str, range(n, n + 60)))}
        for n in range(200)
    ]
    data.write_text(json.dumps(rows))
    train_tokenizer(data, shape.vocab_size).save_pretrained(base)
    tree = {
        "model": {"path": str(base), "dtype": "float32"},
        "output": str(folder / "run"),
        "data": {"train": str(data), "max_length": args.length or 256, "packing": True},
        "adapter": {"rank": args.rank, "alpha": 2 * args.rank},
        "optim": {"warmup_steps": 0},
        "train": {"steps": 2, "global_batch": args.batch or 8, "log_every": 1},
    }
    file = folder / "run.yaml"
    file.write_text(json.dumps(tree))  # JSON is YAML
    return file


def start(file: Path, cache: Path, *arguments: str) -> float:
    """Seconds from the command until the first step's line, or until the end without one."""
    environment = {**os.environ, "XDG_CACHE_HOME": str(cache)}
    environment.pop("JAX_COMPILATION_CACHE_DIR", None)  # what is measured is the default
    command = [sys.executable, "-m", "droplora_jax.cli", "train", str(file), *arguments]
    begin, reached = time.perf_counter(), None
    lines = []
    with subprocess.Popen(command, env=environment, stdout=subprocess.PIPE, text=True) as process:
        assert process.stdout is not None
        for line in process.stdout:
            lines.append(line)
            if reached is None and line.startswith(FIRST_STEP):
                reached = time.perf_counter() - begin
    if process.returncode or (reached is None and "--dry-run" not in arguments):
        sys.exit(f"startup: {' '.join(command)} did not come to its first step:\n{''.join(lines)}")
    return reached if reached is not None else time.perf_counter() - begin
