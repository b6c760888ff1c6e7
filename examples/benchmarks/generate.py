"""Time greedy decoding against transformers' `generate` (PyTorch, eager) on this machine's CPU.

    python examples/benchmarks/generate.py

Same weights, prompts, batch and number of threads on both sides; they take turns, and the result
is the ratio of the median times, with its spread over the rounds. A turn is prompts to tokens,
compiling apart. Leave the machine alone meanwhile, or count CPU seconds on one core (`--threads 1
--clock cpu`). Before anything is timed the tokens of both have to agree. Needs the `test` extra;
no network.
"""

from __future__ import annotations

import argparse
import statistics
import sys
import tempfile
import time
from dataclasses import dataclass
from pathlib import Path
from types import SimpleNamespace

import numpy as np
from work import SHAPES, write_config, write_weights
from workers import Place, Worker, chosen_cores, cpu_model, versions

PAUSE = 0.5  # seconds between turns, in which the last side's threads stop spinning


@dataclass(frozen=True)
class Workload:
    """A model's folder, prompts [B, T], and how many tokens to make."""

    base: Path
    prompts: np.ndarray
    new: int


class Numbers:
    """A tokenizer whose text is the token ids."""

    eos_token_id = None

    def get_added_vocab(self) -> dict[str, int]:
        return {}

    def decode(self, ids: list[int], **_: bool) -> str:
        return "".join(f"{token} " for token in ids)


class Ours:
    packages = ("droplora-jax", "jax", "flax")

    def prepare(self, work: Workload) -> SimpleNamespace:
        import jax.numpy as jnp

        import droplora_jax as dl
        from droplora_jax.inference.config import Sampling
        from droplora_jax.inference.generator import Generator

        model = dl.load(work.base, dtype=jnp.float32)
        generator = Generator(model, Numbers(), batch_size=len(work.prompts))
        prompts, sampling = work.prompts.tolist(), Sampling(max_new_tokens=work.new)

        def run() -> list[list[int]]:
            return [[int(word) for word in t.split()] for t in generator(prompts, sampling)]

        return SimpleNamespace(run=run)


class Theirs:
    packages = ("torch", "transformers")

    def prepare(self, work: Workload) -> SimpleNamespace:
        import os

        import torch
        from transformers import LlamaForCausalLM

        torch.set_num_threads(len(os.sched_getaffinity(0)))
        model = LlamaForCausalLM.from_pretrained(work.base, dtype=torch.float32).eval()
        prompts = torch.from_numpy(work.prompts)
        mask = torch.ones_like(prompts)

        def run() -> list[list[int]]:
            with torch.inference_mode():
                out = model.generate(
                    prompts,
                    attention_mask=mask,
                    max_new_tokens=work.new,
                    do_sample=False,
                    pad_token_id=0,
                )
            return out[:, prompts.shape[1] :].tolist()

        return SimpleNamespace(run=run)


SIDES = {"transformers": Theirs(), "droplora_jax": Ours()}
PACKAGES = (*Ours.packages, *Theirs.packages)


def main() -> None:
    args = parse_arguments()
    print(f"{cpu_model()}, {len(args.cores)} threads; {versions(PACKAGES)}")
    with tempfile.TemporaryDirectory() as folder:
        work = make_workload(Path(folder), args)
        print(
            f"{SHAPES['dense'].parameters / 1e6:.1f}M parameters, float32, {args.batch} prompts of "
            f"{args.prompt} tokens, {args.new} new tokens each, greedy"
        )
        workers = {name: Worker(side, work, Place(args.cores)) for name, side in SIDES.items()}
        check_agreement(workers)
        seconds = time_rounds(workers, args)
        for worker in workers.values():
            worker.stop()
    report(seconds, args)


def parse_arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    add = parser.add_argument
    add("--rounds", type=int, default=7, help="turns of each side (default %(default)s)")
    add("--threads", type=int, default=0, help="of each side (default: every core)")
    add("--batch", type=int, default=8)
    add("--prompt", type=int, default=96, help="tokens of a prompt (default %(default)s)")
    add("--new", type=int, default=128, help="tokens to make (default %(default)s)")
    add("--clock", choices=("wall", "cpu"), default="wall", help="cpu goes with --threads 1")
    args = parser.parse_args()
    if args.clock == "cpu" and args.threads != 1:
        parser.error("--clock cpu needs --threads 1: a thread that waits for another may spin")
    args.cores = chosen_cores(args.threads)
    return args


def make_workload(folder: Path, args: argparse.Namespace) -> Workload:
    """A model of random weights that never ends a row."""
    shape = SHAPES["dense"]
    write_config(folder, shape)
    write_weights(folder, shape)
    prompts = np.random.default_rng(0).integers(0, shape.vocab_size, (args.batch, args.prompt))
    return Workload(folder, prompts, args.new)


def check_agreement(workers: dict[str, Worker]) -> None:
    """One turn of each, which compiles: stop if they do not make the same tokens."""
    made = [workers[name].call("run")[0].value for name in ("transformers", "droplora_jax")]
    if made[0] != made[1]:
        sys.exit("the sides do not make the same tokens; nothing was timed")
    print("the tokens of both sides are the same")


def time_rounds(workers: dict[str, Worker], args: argparse.Namespace) -> dict[str, list[float]]:
    """Seconds of each side's turns."""
    seconds: dict[str, list[float]] = {name: [] for name in workers}
    for _ in range(args.rounds):
        for name, worker in workers.items():
            time.sleep(PAUSE)
            seconds[name].append(getattr(worker.call("run")[0], args.clock))
    return seconds


def report(seconds: dict[str, list[float]], args: argparse.Namespace) -> None:
    tokens = args.batch * args.new
    reference = np.array(seconds["transformers"])
    print(f"\n{'':14}{'seconds':>9}{'tokens/s':>10}{'x transformers':>16}  (min..max over rounds)")
    for name, own in seconds.items():
        median = statistics.median(own)
        ratio, by_round = float(np.median(reference)) / median, reference / np.array(own)
        spread = f"({by_round.min():.2f}..{by_round.max():.2f})"
        print(f"{name:14}{median:9.2f}{tokens / median:10.0f}{ratio:16.2f}  {spread}")


if __name__ == "__main__":
    import generate  # its classes need a name that a worker's process can import

    generate.main()
