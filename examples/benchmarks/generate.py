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
import os
import statistics
import sys
import tempfile
import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import numpy as np
from workers import Worker, cpu_model, versions

PAUSE = 0.5  # seconds between turns, in which the last side's threads stop spinning
PACKAGES = ("droplora-jax", "jax", "flax", "torch", "transformers")

Generate = Callable[[], list[list[int]]]


@dataclass(frozen=True)
class Workload:
    """A model's folder, prompts [B, T], how many tokens to make, and the cores."""

    base: Path
    prompts: np.ndarray
    new: int
    cores: tuple[int, ...]


class Numbers:
    """A tokenizer whose text is the token ids."""

    eos_token_id = None

    def get_added_vocab(self) -> dict[str, int]:
        return {}

    def decode(self, ids: list[int], **_: bool) -> str:
        return "".join(f"{token} " for token in ids)


def ours(work: Workload) -> Generate:
    import jax.numpy as jnp

    import droplora_jax as dl
    from droplora_jax.generate import Generator, Sampling

    model = dl.load(work.base, dtype=jnp.float32)
    generator = Generator(model, Numbers(), batch_size=len(work.prompts))
    prompts, sampling = work.prompts.tolist(), Sampling(max_new_tokens=work.new)
    return lambda: [[int(word) for word in t.split()] for t in generator(prompts, sampling)]


def theirs(work: Workload) -> Generate:
    import torch
    from transformers import LlamaForCausalLM

    torch.set_num_threads(len(work.cores))
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

    return run


def main() -> None:
    args = parse_arguments()
    print(f"{cpu_model()}, {len(args.cores)} threads; {versions(PACKAGES)}")
    with tempfile.TemporaryDirectory() as folder:
        work = make_workload(Path(folder), args)
        parameters = sum(f.stat().st_size for f in work.base.glob("*.safetensors")) / 4e6
        print(
            f"{parameters:.1f}M parameters, float32, {args.batch} prompts of {args.prompt} tokens, "
            f"{args.new} new tokens each, greedy"
        )
        sides = {"transformers": theirs, "droplora_jax": ours}
        workers = {name: Worker(side, work, work.cores) for name, side in sides.items()}
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
    cores = sorted(os.sched_getaffinity(0))
    args.cores = tuple(cores[: args.threads] if args.threads else cores)
    return args


def make_workload(folder: Path, args: argparse.Namespace) -> Workload:
    """A model of random weights that never ends a row."""
    import torch
    from transformers import LlamaConfig, LlamaForCausalLM

    torch.manual_seed(0)
    config = LlamaConfig(
        vocab_size=8192,
        hidden_size=512,
        intermediate_size=1408,
        num_hidden_layers=8,
        num_attention_heads=8,
        num_key_value_heads=4,
        max_position_embeddings=max(args.prompt + args.new, 2048),
        tie_word_embeddings=False,
        eos_token_id=None,
    )
    LlamaForCausalLM(config).save_pretrained(folder)
    prompts = np.random.default_rng(0).integers(0, config.vocab_size, (args.batch, args.prompt))
    return Workload(folder, prompts, args.new, args.cores)


def check_agreement(workers: dict[str, Worker]) -> None:
    """One turn of each, which compiles: stop if they do not make the same tokens."""
    made = [workers[name].run()[0].value for name in ("transformers", "droplora_jax")]
    if made[0] != made[1]:
        sys.exit("the sides do not make the same tokens; nothing was timed")
    print("the tokens of both sides are the same")


def time_rounds(workers: dict[str, Worker], args: argparse.Namespace) -> dict[str, list[float]]:
    """Seconds of each side's turns."""
    seconds: dict[str, list[float]] = {name: [] for name in workers}
    for _ in range(args.rounds):
        for name, worker in workers.items():
            time.sleep(PAUSE)
            seconds[name].append(getattr(worker.run()[0], args.clock))
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
    main()
