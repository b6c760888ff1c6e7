"""What the suite compares: the sides of each part, and the pairs whose ratios count."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

from results import Pair
from sides.ours import Ours
from sides.peft import Peft
from sides.tunix import Tunix

Sides = dict[str, Any]
WIDE = 256  # the rank at which what is dropped is worth leaving out

EAGER, COMPILED, TUNIX = "PEFT eager", "PEFT + torch.compile", "Tunix + Qwix"
CHECKPOINTED = "PEFT eager, checkpointed"
COMPILED_CHECKPOINTED = "PEFT + torch.compile, checkpointed"
LORA, TOKEN = "LoRA (drop_rate=0)", "DropLoRA token"
LEAN = "DropLoRA token, remat=nothing"
DOCUMENT = 250  # tokens, on average
CUDNN, TOKAMAX = "DropLoRA token, cudnn", "DropLoRA token, tokamax"
WIDE_LORA, WIDE_EXACT = f"LoRA, rank {WIDE}", f"DropLoRA step exact, rank {WIDE}"


@dataclass(frozen=True)
class Part:
    """One comparison.

    Attributes:
      sides: by name, from a rank and what ours saves for the backward pass.
    """

    about: str
    sides: Callable[[int, str], Sides]
    pairs: tuple[Pair, ...]


def _dense(rank: int, remat: str) -> Sides:
    return {
        EAGER: Peft(rank=rank),
        COMPILED: Peft(compiled=True, rank=rank),
        TUNIX: Tunix(rank=rank),
        **_plain(rank, remat),
    }


def _real(rank: int, remat: str) -> Sides:
    return {
        EAGER: Peft(rank=rank),
        COMPILED: Peft(compiled=True, rank=rank),
        **_plain(rank, remat),
    }


def _plain(rank: int, remat: str) -> Sides:
    return {
        LORA: Ours(drop_rate=0.0, rank=rank, remat=remat),
        TOKEN: Ours(rank=rank, remat=remat),
    }


def _masks(rank: int, remat: str) -> Sides:
    return _plain(rank, remat) | {
        f"DropLoRA {granularity}{exact}": Ours(
            granularity=granularity,
            sampler="exact" if exact else "bernoulli",
            rank=rank,
            remat=remat,
        )
        for granularity, exact in MASKS
    }


MASKS = (("sequence", ""), ("step", ""), ("sequence", " exact"), ("step", " exact"))


def _wide(rank: int, remat: str) -> Sides:
    return {
        WIDE_LORA: Ours(drop_rate=0.0, rank=WIDE, remat=remat),
        WIDE_EXACT: Ours(granularity="step", sampler="exact", rank=WIDE, remat=remat),
    }


def _gpu(rank: int, remat: str) -> Sides:
    """In the order in which they matter, since time may run out."""
    return {
        TOKEN: Ours(rank=rank, remat=remat),
        CHECKPOINTED: Peft(checkpointed=True, rank=rank),
        LEAN: Ours(rank=rank, remat="nothing"),
        EAGER: Peft(rank=rank),
        COMPILED: Peft(compiled=True, rank=rank),
        LORA: Ours(drop_rate=0.0, rank=rank, remat=remat),
        COMPILED_CHECKPOINTED: Peft(compiled=True, checkpointed=True, rank=rank),
    }


def _gpu_packed(rank: int, remat: str) -> Sides:
    return {
        name: Ours(rank=rank, remat=remat, attention=kernel, document=DOCUMENT)
        for name, kernel in ((CUDNN, "cudnn"), (TOKAMAX, "tokamax"))
    }


PARTS = {
    "dense": Part(
        "full rows, every position trained",
        _dense,
        (
            Pair(TOKEN, EAGER, "speed", 1.25),
            Pair(TOKEN, COMPILED, "speed", 1.05),
            Pair(TOKEN, TUNIX, "speed", 1.55),
            Pair(LORA, EAGER, "speed"),
            Pair(LORA, COMPILED, "speed"),
            Pair(LORA, TUNIX, "speed"),
            Pair(TOKEN, LORA, "time", 1.02),
            Pair(TOKEN, EAGER, "memory", 0.6),
            Pair(TOKEN, COMPILED, "memory"),
            Pair(TOKEN, TUNIX, "memory"),
        ),
    ),
    "masks": Part(
        "full rows, every position trained: what the masks cost",
        _masks,
        (
            Pair(TOKEN, LORA, "time", 1.02),
            *(Pair(f"DropLoRA {g}{e}", LORA, "time", 1.02) for g, e in MASKS),
        ),
    ),
    "wide": Part(
        "full rows, every position trained: ranks that are dropped are not computed",
        _wide,
        (Pair(WIDE_EXACT, WIDE_LORA, "speed", 1.0),),
    ),
    "real": Part(
        "instruction data, end to end: peers pad to the longest row of a batch, ours packs",
        _real,
        (
            Pair(TOKEN, EAGER, "speed", 2.5),
            Pair(TOKEN, COMPILED, "speed"),
            Pair(LORA, EAGER, "speed"),
            Pair(TOKEN, EAGER, "memory"),
        ),
    ),
    "gpu": Part(
        "one GPU, full rows, every position trained",
        _gpu,
        (
            Pair(TOKEN, EAGER, "speed", 1.5),
            Pair(TOKEN, CHECKPOINTED, "speed", 1.5),
            Pair(TOKEN, COMPILED, "speed", 1.15),
            Pair(TOKEN, COMPILED_CHECKPOINTED, "speed", 1.15),
            Pair(TOKEN, LORA, "time", 1.02),
            Pair(TOKEN, CHECKPOINTED, "memory", 0.7),
            Pair(LEAN, CHECKPOINTED, "memory", 0.7),
        ),
    ),
    "gpu-packed": Part(
        f"one GPU, rows of documents of {DOCUMENT} tokens on average, every position trained",
        _gpu_packed,
        (Pair(TOKAMAX, CUDNN, "speed"), Pair(TOKAMAX, CUDNN, "memory")),
    ),
}
