"""Measure our training step against PEFT's and Tunix + Qwix's, on a CPU or on one GPU.

    python examples/benchmarks/suite.py                      # dense, masks, wide, startup
    python examples/benchmarks/suite.py real --data FILE     # instruction, input, output
    python examples/benchmarks/suite.py gpu                  # one GPU, LLaMA 3.1 8B, < 8 minutes
    python examples/benchmarks/suite.py gpu-packed           # its attention kernels, packed rows

Every side has the same weights, factors, tokens, precision, optimizer and cores, and a process of
its own; on a CPU they take turns. Ratios are taken round by round: their median, and extremes.
Nothing is compared before the first loss and gradient norm of all sides agree, and the tokens and
targets that they were given are the same. DropLoRA's masks have no counterpart elsewhere: it shows
that it is the same model by its loss without them.

Memory is a GPU's peak, or on a CPU the most that a side's process has resident while it trains,
above the bytes of the base weights; in brackets the same before the first step: interpreter and
packages. What a compiler leaves behind is in it: `--cache`, the second time, shows it without.

Tables go to the terminal, JSON and a picture of each part to `--output`. Needs the `test` extra,
and no network; what is not installed is skipped, and says so. Leave the machine alone.
"""

from __future__ import annotations

import argparse
import platform
import sys
import tempfile
import time
from dataclasses import replace
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

import results
import startup
from instructions import LINE, first_rows, lines_a_step, real_rows, train_tokenizer
from parts import PARTS, WIDE
from results import Comparison
from sides.peak import Peak
from turns import Plan, UnlikeWork, measure
from work import SHAPES, TARGETS, Work, dense_rows, write_config, write_factors
from workers import Failed, Place, Worker, chosen_cores, cpu_model

ON_CPU = ("dense", "masks", "wide", "startup")
ON_GPU = ("gpu", "gpu-packed")


def main() -> None:
    args = parse_arguments()
    print(f"{cpu_model()}, {len(args.cores)} threads, Python {platform.python_version()}")
    for part in args.parts:
        with tempfile.TemporaryDirectory() as folder:
            if part == "startup":
                startup.run(Path(folder), args)
            else:
                run_part(part, Path(folder), args)


def parse_arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        description=__doc__.splitlines()[0], formatter_class=argparse.ArgumentDefaultsHelpFormatter
    )
    add = parser.add_argument
    names = (*ON_CPU, "real", *ON_GPU)
    add("parts", nargs="*", metavar="PART", help=f"{', '.join(names)}; none: {', '.join(ON_CPU)}")
    add("--data", type=Path, metavar="FILE", help="of `real`: JSON rows as Alpaca has them")
    add("--output", type=Path, metavar="DIR", default=Path("benchmark-results"))
    add("--cache", type=Path, metavar="DIR", help="keep programs that JAX compiled, as runs do")
    add("--sides", nargs="*", metavar="TEXT", help="only sides whose name holds one of these")
    add("--shape", choices=SHAPES, help="default: dense, or 8b on a GPU")
    add("--rank", type=int, default=32)
    add("--remat", default="dots", help="what ours saves for its backward pass")
    add("--batch", type=int, help="rows of a step; default: 8, or 4 on a GPU")
    add("--length", type=int, help="trained tokens of a row; default: 256, or 4096 on a GPU")
    add("--rows", type=int, default=64, help="of `real`, in a turn")
    add("--rounds", type=int, help="in which every side has its turns; default: 5, on a GPU 3")
    add("--turns", type=int, help="timed turns of a round; default: 2, of `real` 1")
    add("--warmup", type=int, help="untimed turns; default: 2, of `real` 1")
    add("--threads", type=int, default=0, help="of each side; 0: every core")
    add("--clock", choices=("wall", "cpu"), default="wall", help="cpu goes with --threads 1")
    add("--seconds", type=float, default=465, help="on a GPU: sides not done by then are left out")
    add(
        "--python",
        action="append",
        default=[],
        metavar="KIND=PATH",
        help="another Python for sides of this kind: Peft or Tunix",
    )
    args = parser.parse_args()
    args.parts = args.parts or list(ON_CPU)
    if unknown := set(args.parts) - set(names):
        parser.error(f"no such part: {', '.join(sorted(unknown))}; there are {', '.join(names)}")
    if "real" in args.parts and args.data is None:
        parser.error("real needs --data FILE")
    if args.clock == "cpu" and args.threads != 1:
        parser.error("--clock cpu needs --threads 1: a thread that waits for another may spin")
    args.python = dict(item.split("=", 1) for item in args.python)
    args.cores = chosen_cores(args.threads)
    return args


def run_part(name: str, folder: Path, args: argparse.Namespace) -> None:
    part, plan = PARTS[name], make_plan(name, args)
    work = make_work(name, folder, args)
    sides = {
        side: value
        for side, value in part.sides(args.rank, args.remat).items()
        if not args.sides or any(text in side for text in args.sides)
    }
    title = f"{name}: {part.about}; {described(work, args)}"
    print(f"\n{title}", flush=True)
    places = {side: place(value, work, args) for side, value in sides.items()}
    try:
        peak = matrix_peak(work, plan, args) if name == "gpu" else None
        outcomes = measure(sides, work, places, plan)
    except UnlikeWork as unlike:
        sys.exit(f"{unlike}; nothing is reported")
    found = Comparison(name, title, work, outcomes, part.pairs, setting(args), peak)
    print(f"\n{results.table(found)}\n\n{results.ratio_table(found)}")
    results.write(args.output, found)
    print(f"\n{args.output / name}.json and .png")
    if errors := [side for side, o in outcomes.items() if getattr(o, "kind", "") == "error"]:
        sys.exit(f"failed: {', '.join(errors)}")


def make_plan(part: str, args: argparse.Namespace) -> Plan:
    gpu, few = part in ON_GPU, 1 if part == "real" else 2
    plan = Plan(
        rounds=args.rounds or (3 if gpu else 5),
        turns=args.turns or few,
        warmup=args.warmup or few,
        clock=args.clock,
    )
    if not gpu:
        return plan
    return replace(plan, alternate=False, pause=0.0, deadline=time.monotonic() + args.seconds)


def make_work(part: str, folder: Path, args: argparse.Namespace) -> Work:
    gpu = part in ON_GPU
    shape = SHAPES[args.shape or ("8b" if gpu else "dense")]
    on_gpu = gpu and args.shape != "tiny"  # so that all of it can be tried where there is none
    batch, length = args.batch or (4 if gpu else 8), args.length or (4096 if gpu else 256)
    write_config(folder, shape)
    write_factors(folder, shape, [WIDE if part == "wide" else args.rank])
    line = lines = 0
    if part == "real":
        tokenizer = train_tokenizer(args.data, shape.vocab_size)
        rows = real_rows(args.data, tokenizer, args.rows, folder)
        line, lines = LINE, lines_a_step(rows, batch)
        first = first_rows(rows, batch, lines)
    else:
        rows, first = dense_rows(shape, batch, length), batch
    return Work(
        shape=shape,
        rows=rows,
        batch=batch,
        first=first,
        dtype="bfloat16" if gpu else "float32",
        device="gpu" if on_gpu else "cpu",
        folder=folder,
        line=line,
        lines=lines,
    )


def described(work: Work, args: argparse.Namespace) -> str:
    rows = f"batch {work.batch} x {len(work.rows[0].ids) - 1}"
    if work.line:
        rows = (
            f"{len(work.rows)} rows of {work.tokens:,} tokens, {work.labels:,} of them trained; "
            f"batches of {work.batch} rows, or of {work.lines} x {work.line} packed"
        )
    return (
        f"{work.shape.parameters / 1e6:,.1f}M parameters, {work.dtype}, {rows}, rank {args.rank} "
        f"on {', '.join(TARGETS)}, AdamW"
    )


def place(side: Any, work: Work, args: argparse.Namespace) -> Place:
    python = args.python.get(type(side).__name__, sys.executable)
    environment = {"TOKENIZERS_PARALLELISM": "false", "HF_HUB_OFFLINE": "1"}
    # Compile time is measured, unless a cache was asked for.
    environment |= {"TORCHINDUCTOR_FORCE_DISABLE_CACHES": "0" if args.cache else "1"}
    environment |= {"JAX_ENABLE_COMPILATION_CACHE": "true" if args.cache else "false"}
    if args.cache:
        environment |= {"JAX_COMPILATION_CACHE_DIR": str(args.cache.resolve())}
    if work.device == "gpu":
        # One side at a time has all of the GPU's memory.
        environment |= {"XLA_PYTHON_CLIENT_MEM_FRACTION": "0.95"}
        environment |= {"PYTORCH_CUDA_ALLOC_CONF": "expandable_segments:True"}
    return Place(args.cores, python, environment)


def matrix_peak(work: Work, plan: Plan, args: argparse.Namespace) -> float | None:
    """Operations a second of a matrix product here, the faster of the two frameworks' ones."""
    found = []
    for framework in ("jax", "torch"):
        side = Peak(framework, 8192 if work.device == "gpu" else 256)
        try:
            worker = Worker(side, work, place(side, work, args), plan.deadline)
            found.append(worker.call("run")[0].value)
            worker.stop()
            print(f"  matrix product in {framework}: {found[-1] / 1e12:.3g} TFLOP/s", flush=True)
        except Failed as failed:
            print(f"  matrix product in {framework}: skipped: {failed}", flush=True)
    return max(found, default=None)


def setting(args: argparse.Namespace) -> dict[str, Any]:
    """What to write down with every result."""
    return {
        "date": datetime.now(UTC).isoformat(timespec="seconds"),
        "cpu": cpu_model(),
        "threads": len(args.cores),
        "python": platform.python_version(),
        "arguments": {key: str(value) for key, value in vars(args).items()},
    }


if __name__ == "__main__":
    main()
