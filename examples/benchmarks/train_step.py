"""Time a DropLoRA training step against PEFT's (PyTorch, eager) on this machine's CPU.

    python examples/benchmarks/train_step.py

Same weights, factors, tokens and number of threads on both sides; they take turns, and the result
is the ratio of the median step times, with the spread of the ratio over the rounds. PEFT has no
rank dropout: it trains plain LoRA, ours DropLoRA. Leave the machine alone meanwhile, or count CPU
seconds on one core (`--threads 1 --clock cpu`). Before anything is timed, the loss and the
gradient norm of one step without masks have to agree. Needs the `test` extra; no network.
"""

from __future__ import annotations

import argparse
import json
import os
import statistics
import sys
import tempfile
import time
from importlib.metadata import version
from pathlib import Path

import numpy as np
from sides import TARGETS, Ours, Peft, Workload
from workers import Worker, cpu_model, versions

TOLERANCE = 1e-4  # relative, between the first losses and gradient norms of the sides
PAUSE = 0.5  # seconds between turns, in which the last side's threads stop spinning
PACKAGES = ("droplora-jax", "jax", "flax", "torch", "transformers", "peft")


def main() -> None:
    args = parse_arguments()
    print(f"{cpu_model()}, {len(args.cores)} threads; {versions(PACKAGES)}")
    with tempfile.TemporaryDirectory() as folder:
        work = make_workload(Path(folder), args)
        parameters = sum(f.stat().st_size for f in work.base.glob("*.safetensors")) / 4e6
        print(
            f"{parameters:.1f}M parameters, float32, batch {args.batch} x {args.length}, rank "
            f"{args.rank} on {', '.join(TARGETS)}; AdamW, every position trained"
        )
        workers = {
            name: Worker(side.prepare, work, work.cores)
            for name, side in chosen_sides(args).items()
        }
        check_agreement(workers)
        rounds = time_rounds(workers, args)
        for worker in workers.values():
            worker.stop()
    report(rounds, args)


def parse_arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    add = parser.add_argument
    add("--rounds", type=int, default=5, help="turns of each side (default %(default)s)")
    add("--steps", type=int, default=2, help="timed steps of a turn (default %(default)s)")
    add("--warmup", type=int, default=2, help="untimed steps of each side (default %(default)s)")
    add("--threads", type=int, default=0, help="of each side (default: every core)")
    add("--batch", type=int, default=8)
    add("--length", type=int, default=256)
    add("--rank", type=int, default=32)
    add("--remat", default="dots", help="what ours saves for its backward pass")
    add(
        "--clock",
        choices=("wall", "cpu"),
        default="wall",
        help="cpu with --threads 1: CPU seconds, for a machine that others use too",
    )
    add("--variants", action="store_true", help="also every granularity of the mask")
    add("--json", type=Path, metavar="FILE", help="write the figures here too")
    args = parser.parse_args()
    if args.clock == "cpu" and args.threads != 1:
        parser.error("--clock cpu needs --threads 1: a thread that waits for another may spin")
    cores = sorted(os.sched_getaffinity(0))
    args.cores = tuple(cores[: args.threads] if args.threads else cores)
    return args


def make_workload(folder: Path, args: argparse.Namespace) -> Workload:
    """Random weights, and factors that are not zero, in the formats of transformers and PEFT."""
    import peft
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
        max_position_embeddings=max(args.length, 2048),
        tie_word_embeddings=False,
    )
    model = LlamaForCausalLM(config)
    model.save_pretrained(folder / "base")
    lora = peft.LoraConfig(
        r=args.rank,
        lora_alpha=2 * args.rank,
        target_modules=list(TARGETS),
        init_lora_weights=False,
        task_type="CAUSAL_LM",
    )
    peft.get_peft_model(model, lora).save_pretrained(folder / "factors")
    tokens = np.random.default_rng(0).integers(0, config.vocab_size, (args.batch, args.length + 1))
    return Workload(folder / "base", folder / "factors", args.rank, tokens, args.cores)


def chosen_sides(args: argparse.Namespace) -> dict[str, Ours | Peft]:
    sides: dict[str, Ours | Peft] = {
        "PEFT LoRA": Peft(),
        "LoRA (drop_rate=0)": Ours(drop_rate=0.0, remat=args.remat),
        "DropLoRA token": Ours(remat=args.remat),
    }
    if args.variants:
        for granularity in ("sequence", "step"):
            sides[f"DropLoRA {granularity}"] = Ours(granularity=granularity, remat=args.remat)
        sides["DropLoRA step exact"] = Ours(granularity="step", sampler="exact", remat=args.remat)
    return sides


def check_agreement(workers: dict[str, Worker]) -> None:
    """One step of each side without masks: stop if they do not compute the same thing."""
    theirs, ours = (workers[name].run(1)[0].value for name in ("PEFT LoRA", "LoRA (drop_rate=0)"))
    pairs = dict(zip(("loss", "gradient norm"), zip(ours, theirs, strict=True), strict=True))
    for name, (a, b) in pairs.items():
        print(f"first step without masks: {name} {a:.6f} (ours), {b:.6f} (PEFT)")
        if not abs(a - b) <= TOLERANCE * abs(b):
            sys.exit(f"the sides do not compute the same thing: {name} differs; nothing was timed")


def time_rounds(workers: dict[str, Worker], args: argparse.Namespace) -> dict[str, list]:
    """Seconds per step of each side: [rounds][steps]."""
    for worker in workers.values():
        worker.run(args.warmup)
        time.sleep(PAUSE)
    seconds: dict[str, list] = {name: [] for name in workers}
    for _ in range(args.rounds):
        for name, worker in workers.items():
            seconds[name].append([getattr(result, args.clock) for result in worker.run(args.steps)])
            time.sleep(PAUSE)
    return seconds


def report(rounds: dict[str, list], args: argparse.Namespace) -> None:
    tokens = args.batch * args.length
    reference = np.array(rounds["PEFT LoRA"])
    print(f"\n{'':22}{'s/step':>8}{'tokens/s':>10}{'x PEFT':>8}  (min..max over rounds)")
    figures = {}
    for name, seconds in rounds.items():
        median = statistics.median(np.ravel(seconds))
        ratio = float(np.median(reference)) / median
        by_round = np.median(reference, axis=1) / np.median(seconds, axis=1)
        low, high = float(by_round.min()), float(by_round.max())
        print(f"{name:22}{median:8.3f}{tokens / median:10.0f}{ratio:8.2f}  ({low:.2f}..{high:.2f})")
        figures[name] = {
            "seconds": seconds,
            "median_seconds": median,
            "tokens_per_second": tokens / median,
            "speed_over_peft": ratio,
            "spread": [low, high],
        }
    if args.json:
        setting = {name: str(value) for name, value in vars(args).items() if name != "json"}
        record = {
            "cpu": cpu_model(),
            "threads": len(args.cores),
            "versions": {name: version(name) for name in PACKAGES},
            "arguments": setting,
            "sides": figures,
        }
        args.json.write_text(json.dumps(record, indent=2) + "\n")


if __name__ == "__main__":
    main()
