"""Adapters that PEFT trained, and models that it loads."""

from __future__ import annotations

from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import peft
import torch
from oracles import random_tokens, torch_logits
from transformers import AutoModelForCausalLM

TOKENS = random_tokens(2, 24)
ATTENTION = ["q_proj", "v_proj"]


class Trained(NamedTuple):
    """A base, and an adapter that PEFT trained on it."""

    base: Path
    adapter: Path
    logits: np.ndarray


def train_in_peft(base: Path, folder: Path, **options: Any) -> Trained:
    """Two steps of AdamW: every trained tensor moves. Logits are those of `TOKENS`."""
    with torch.random.fork_rng():
        torch.manual_seed(1)
        config = {"r": 3, "lora_alpha": 5, "target_modules": ATTENTION, **options}
        theirs = peft.get_peft_model(
            AutoModelForCausalLM.from_pretrained(base, dtype=torch.float32),
            peft.LoraConfig(task_type="CAUSAL_LM", **config),
        )
        optimizer = torch.optim.AdamW(theirs.parameters(), lr=0.05)
        batch = torch.tensor(TOKENS, dtype=torch.long)
        for _ in range(2):
            theirs(batch, labels=batch).loss.backward()
            optimizer.step()
            optimizer.zero_grad()
    theirs.save_pretrained(folder)
    return Trained(base, folder, torch_logits(theirs.eval(), TOKENS))


def in_peft(base: Path, adapter: Path) -> peft.PeftModel:
    model = AutoModelForCausalLM.from_pretrained(base, dtype=torch.float32)
    return peft.PeftModel.from_pretrained(model, adapter).eval()
