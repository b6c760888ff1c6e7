"""The sides that `train_step.py` compares: ours in JAX, and PEFT's in PyTorch.

Both train the same factors on the same frozen weights with the same tokens, and one step of each
is what a user's loop does: forward, backward, clip to norm 1, AdamW. Each side lives in a process
of its own, which sleeps until it is told to run, so that no two ever share the cores.
"""

from __future__ import annotations

import multiprocessing
import os
import time
from collections.abc import Callable
from dataclasses import dataclass
from multiprocessing.connection import Connection
from pathlib import Path

import numpy as np

LEARNING_RATE = 3e-4
WEIGHT_DECAY = 0.1
CLIP_NORM = 1.0
TARGETS = ("q_proj", "k_proj", "v_proj", "up_proj", "down_proj")

Step = Callable[[], tuple[float, float]]  # one step: the loss and the norm of the gradient


@dataclass(frozen=True)
class Result:
    """One step: seconds on the clock, seconds of the cores, loss, norm of the gradient."""

    wall: float
    cpu: float
    loss: float
    norm: float


@dataclass(frozen=True)
class Workload:
    """Folders of the base and of the factors to start from, tokens [B, T + 1], and the cores."""

    base: Path
    factors: Path
    rank: int
    tokens: np.ndarray
    cores: tuple[int, ...]


@dataclass(frozen=True)
class Ours:
    """DropLoRA; `drop_rate=0` is LoRA."""

    drop_rate: float = 0.5
    granularity: str = "token"
    sampler: str = "bernoulli"
    remat: str = "dots"

    def prepare(self, work: Workload) -> Step:
        import jax
        import jax.numpy as jnp
        import optax

        import droplora_jax as dl
        from droplora_jax import optim, sharding, step

        mesh = dl.make_mesh()
        config = dl.DropLoRA(
            rank=work.rank,
            alpha=2 * work.rank,
            drop_rate=self.drop_rate,
            granularity=self.granularity,
            sampler=self.sampler,
        )
        model = dl.load(work.base, mesh=mesh, dtype=jnp.float32, remat=self.remat)
        model = dl.load_adapter(model, work.factors, config=config)
        graphdef, adapters, mask_keys, frozen = dl.split(model)
        settings = optim.OptimConfig(weight_decay=WEIGHT_DECAY, clip_norm=CLIP_NORM)
        tx = optim.optimizer(settings, optax.constant_schedule(LEARNING_RATE))
        train_step = step.compile_train_step(graphdef, tx, adapters)
        state = step.init_state(adapters, tx)
        inputs, targets = (x.astype(np.int32)[None] for x in _shifted(work.tokens))
        host_batch = step.Batch(tokens=inputs, targets=targets, segment_ids=np.ones_like(inputs))

        def run() -> tuple[float, float]:
            nonlocal state
            batch = sharding.put(host_batch, (None, "batch"), mesh)
            state, metrics = train_step(state, mask_keys, frozen, batch, dl.root_key(0))
            jax.block_until_ready(state)
            return float(metrics["loss"]), float(metrics["grad_norm"])

        return run


@dataclass(frozen=True)
class Peft:
    """PEFT's LoRA, eager, without dropout: it has no rank dropout, so it does a little less."""

    def prepare(self, work: Workload) -> Step:
        import peft
        import torch
        from transformers import LlamaForCausalLM

        torch.set_num_threads(len(work.cores))
        base = LlamaForCausalLM.from_pretrained(work.base, dtype=torch.float32)
        model = peft.PeftModel.from_pretrained(base, work.factors, is_trainable=True).train()
        trained = [p for p in model.parameters() if p.requires_grad]
        tx = torch.optim.AdamW(trained, lr=LEARNING_RATE, weight_decay=WEIGHT_DECAY)
        inputs, targets = (torch.from_numpy(x) for x in _shifted(work.tokens))

        def run() -> tuple[float, float]:
            logits = model(input_ids=inputs, use_cache=False).logits
            loss = torch.nn.functional.cross_entropy(logits.flatten(0, 1), targets.flatten())
            loss.backward()
            norm = torch.nn.utils.clip_grad_norm_(trained, CLIP_NORM)
            tx.step()
            tx.zero_grad()
            return loss.item(), norm.item()

        return run


def _shifted(tokens: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    return np.ascontiguousarray(tokens[:, :-1]), np.ascontiguousarray(tokens[:, 1:])


class Worker:
    """A side in its own process."""

    def __init__(self, side: Ours | Peft, work: Workload) -> None:
        context = multiprocessing.get_context("spawn")
        self._pipe, theirs = context.Pipe()
        self._process = context.Process(target=_serve, args=(side, work, theirs), daemon=True)
        self._process.start()

    def run(self, steps: int) -> list[Result]:
        """Run the next steps."""
        self._pipe.send(steps)
        return self._pipe.recv()

    def stop(self) -> None:
        self._pipe.send(0)
        self._process.join()


def _serve(side: Ours | Peft, work: Workload, pipe: Connection) -> None:
    # Before torch or JAX starts its threads: both make one for every core that they may use.
    os.sched_setaffinity(0, work.cores)
    step = side.prepare(work)
    while steps := pipe.recv():
        results = []
        for _ in range(steps):
            wall, cpu = time.perf_counter(), time.process_time()
            loss, norm = step()
            wall, cpu = time.perf_counter() - wall, time.process_time() - cpu
            results.append(Result(wall, cpu, loss, norm))
        pipe.send(results)
