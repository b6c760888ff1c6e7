"""Tunix's Llama 3 with LoRA by Qwix, and its trainer's own step and loss."""

from __future__ import annotations

import re
from dataclasses import dataclass
from typing import Any

import numpy as np
from weights import numpy_values
from work import CLIP_NORM, LEARNING_RATE, TARGETS, WEIGHT_DECAY, Done, Row, Tally, Work, pad
from workers import Unavailable


@dataclass(frozen=True)
class Tunix:
    rank: int = 32

    packages = ("google-tunix", "qwix", "jax", "flax")
    masked = False

    def prepare(self, work: Work) -> Training:
        if work.line or work.dtype != "float32" or work.device != "cpu":
            raise Unavailable("compared on full rows, in float32, on a CPU only")
        return Training(self, work)


class Training:
    def __init__(self, side: Tunix, work: Work) -> None:
        import jax
        import optax
        from tunix.sft.peft_trainer import PeftTrainer, TrainingConfig

        jax.config.update("jax_platforms", "cpu")
        tx = optax.chain(
            optax.clip_by_global_norm(CLIP_NORM),
            optax.adamw(LEARNING_RATE, weight_decay=WEIGHT_DECAY),
        )
        model = _with_factors(_base(work), work, side.rank)
        trainer = PeftTrainer(model, tx, TrainingConfig(eval_every_n_steps=10**9))
        self.step, _ = trainer.with_gen_model_input_fn(_model_input).jit_train_and_eval_step(
            cache_nnx_graph=True
        )
        self.work = work

    def first(self) -> Done:
        return self._train(self.work.rows[: self.work.first])

    def run(self) -> Done:
        return self._train(self.work.rows)

    def _train(self, rows: tuple[Row, ...]) -> Done:
        ids = np.stack([row.ids for row in rows])  # its loss leaves out the last position itself
        mask = np.stack([row.trained for row in rows])
        mask[:, 0] = True  # seen, and no target in any case
        loss, _, norm = self.step({"tokens": ids, "mask": mask})
        padded = pad(rows)
        given = Tally.of(padded.tokens, padded.targets, np.ones_like(padded.tokens, bool))
        return Done(float(loss), float(norm), 1, given)


def _model_input(batch: dict[str, Any]) -> dict[str, Any]:
    from tunix.sft import utils

    return {
        "input_tokens": batch["tokens"],
        "input_mask": batch["mask"],
        "positions": utils.build_positions_from_mask(batch["mask"]),
        "attention_mask": utils.make_causal_attn_mask(batch["mask"]),
    }


def _base(work: Work) -> Any:
    """Its model with `weights.py`'s values, through its own table of names."""
    from flax import nnx
    from tunix.models.llama3 import model, params

    shape = work.shape
    config = model.ModelConfig(
        num_layers=shape.num_hidden_layers,
        vocab_size=shape.vocab_size,
        embed_dim=shape.hidden_size,
        hidden_dim=shape.intermediate_size,
        num_heads=shape.num_attention_heads,
        head_dim=shape.head_dim,
        num_kv_heads=shape.num_key_value_heads,
        rope_theta=int(shape.rope_theta),
        norm_eps=shape.hf["rms_norm_eps"],
    )
    base = model.Llama3(config, rngs=nnx.Rngs(0))
    table = params._get_key_and_transform_mapping(config)
    for name, size in shape.tensors().items():
        pattern, (place, how) = next(item for item in table.items() if re.fullmatch(item[0], name))
        value = numpy_values(name, size)
        if how is not None:
            permutation, reshaped = how
            value = value.transpose(permutation)
            value = value.reshape(reshaped) if reshaped is not None else value
        _set(base, re.sub(pattern, place, name), value)
    return base


def _with_factors(base: Any, work: Work, rank: int) -> Any:
    import qwix
    from flax import nnx
    from safetensors.numpy import load_file

    provider = qwix.LoraProvider(
        module_path="|".join(f".*{name}" for name in TARGETS), rank=rank, alpha=2.0 * rank
    )
    rngs = nnx.Rngs(0)
    model = qwix.apply_lora_to_model(base, provider, **base.get_model_input(), rngs=rngs)
    tensors = load_file(work.factors(rank) / "adapter_model.safetensors")
    for key, value in tensors.items():
        found = re.search(r"(layers\.\d+)\.(?:self_attn|mlp)\.(\w+)\.lora_([AB])", key)
        layer, name, part = found.groups()
        attention = name in ("q_proj", "k_proj", "v_proj")
        path = f"{layer}.attn.{name}.w" if attention else f"{layer}.mlp.{name}.kernel"
        _set(model, f"{path}_lora_{part.lower()}", value.T)
    return model


def _set(model: Any, path: str, value: np.ndarray) -> None:
    import jax.numpy as jnp

    *owners, last = path.split(".")
    for name in owners:
        model = model[int(name)] if name.isdigit() else getattr(model, name)
    variable = getattr(model, last)
    variable.value = jnp.asarray(value, variable.value.dtype).reshape(variable.value.shape)
