"""PEFT's LoRA in PyTorch, without dropout: it has no rank dropout, so it does a little less."""

from __future__ import annotations

import os
from collections.abc import Iterable
from contextlib import nullcontext
from dataclasses import dataclass
from typing import Any

import numpy as np
from weights import is_norm, scaled, value_bits
from work import CLIP_NORM, LEARNING_RATE, WEIGHT_DECAY, Done, Padded, Tally, Work, pad
from workers import Unavailable


@dataclass(frozen=True)
class Peft:
    """Eager, or the model and the loss compiled; activations kept, or checkpointed by layer."""

    compiled: bool = False
    checkpointed: bool = False
    rank: int = 32

    packages = ("torch", "transformers", "peft")
    masked = False

    def prepare(self, work: Work) -> Training:
        return Training(self, work)


class Training:
    def __init__(self, side: Peft, work: Work) -> None:
        import peft
        import torch

        self.device = "cuda" if work.device == "gpu" else "cpu"
        if work.device == "gpu" and not torch.cuda.is_available():
            raise Unavailable("PyTorch sees no GPU; install torch with CUDA")
        torch.set_num_threads(len(os.sched_getaffinity(0)))
        base = _base(work, self.device)
        if side.checkpointed:
            _checkpoint(base)
        folder = work.factors(side.rank)
        self.model = peft.PeftModel.from_pretrained(base, folder, is_trainable=True).train()
        self.trained = [p for p in self.model.parameters() if p.requires_grad]
        self.tx = torch.optim.AdamW(
            self.trained,
            lr=LEARNING_RATE,
            weight_decay=WEIGHT_DECAY,
            fused=work.device == "gpu",
        )
        self.loss = torch.compile(self._loss) if side.compiled else self._loss
        self.work = work

    def first(self) -> Done:
        return self._train([pad(self.work.rows[: self.work.first])])

    def run(self) -> Done:
        return self._train(self.work.padded())

    def device_peak(self) -> int | None:
        import torch

        return torch.cuda.max_memory_allocated() if self.device == "cuda" else None

    def _loss(self, tokens: Any, targets: Any, mask: Any) -> Any:
        import torch

        logits = self.model(input_ids=tokens, attention_mask=mask, use_cache=False).logits
        return torch.nn.functional.cross_entropy(
            logits.flatten(0, 1).float(), targets.flatten(), ignore_index=-1
        )

    def _train(self, batches: Iterable[Padded]) -> Done:
        import torch

        bfloat16 = self.work.dtype == "bfloat16"
        cast = torch.autocast(self.device, torch.bfloat16) if bfloat16 else nullcontext()
        steps, given = 0, Tally()
        for batch in batches:
            arrays = (batch.tokens, batch.targets, batch.mask)
            tensors = [x if x is None else torch.from_numpy(x).to(self.device) for x in arrays]
            with cast:
                loss = self.loss(*tensors)
            loss.backward()
            norm = torch.nn.utils.clip_grad_norm_(self.trained, CLIP_NORM)
            self.tx.step()
            self.tx.zero_grad()
            steps, given = steps + 1, given + _tally(batch)
        return Done(loss.item(), norm.item(), steps, given)


def _base(work: Work, device: str) -> Any:
    import torch
    from transformers import AutoModelForCausalLM, LlamaConfig

    dtype = getattr(torch, work.dtype)
    with torch.device(device):
        model = AutoModelForCausalLM.from_config(
            LlamaConfig(**work.shape.hf), dtype=dtype, attn_implementation="sdpa"
        )
        for name, parameter in model.named_parameters():
            if is_norm(name):
                continue  # 1 already
            index = torch.arange(parameter.numel(), dtype=torch.int32).view(parameter.shape)
            parameter.data.copy_(scaled(value_bits(index, name).float()))
    return model


def _checkpoint(base: Any) -> None:
    """By layer; `transformers` had another name for it before 5.23."""
    new = getattr(base, "activation_checkpointing_enable", None)
    (new or base.gradient_checkpointing_enable)({"use_reentrant": False})


def _tally(batch: Padded) -> Tally:
    there = np.ones_like(batch.tokens, bool) if batch.mask is None else batch.mask != 0
    return Tally.of(batch.tokens, batch.targets, there)
