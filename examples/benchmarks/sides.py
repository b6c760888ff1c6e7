"""The sides that `train_step.py` compares: ours in JAX, and PEFT's in PyTorch.

Both train the same factors on the same frozen weights with the same tokens, and one step of each
is what a user's loop does: forward, backward, clip to norm 1, AdamW.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import numpy as np

LEARNING_RATE = 3e-4
WEIGHT_DECAY = 0.1
CLIP_NORM = 1.0
TARGETS = ("q_proj", "k_proj", "v_proj", "up_proj", "down_proj")

Step = Callable[[], tuple[float, float]]  # one step: the loss and the norm of the gradient


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
