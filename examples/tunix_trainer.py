"""DropLoRA in Tunix's PeftTrainer, on a Llama of Tunix's: python examples/tunix_trainer.py.

pip install "droplora-jax[tunix]"
"""

import jax.numpy as jnp
import numpy as np
import optax
from flax import nnx
from tunix.models.llama3 import model as llama3
from tunix.sft import utils
from tunix.sft.peft_trainer import PeftTrainer, TrainingConfig

import droplora_jax as dl
from droplora_jax.adapters.interop.trainers import masked_loss, numbered

key = dl.root_key(0)
shape = llama3.ModelConfig(
    num_layers=2,
    vocab_size=64,
    embed_dim=32,
    hidden_dim=64,
    num_heads=4,
    head_dim=8,
    num_kv_heads=2,
    rope_theta=500_000,
    norm_eps=1e-5,
)
model = llama3.Llama3(shape, rngs=nnx.Rngs(0))  # or one that Tunix loaded
model = dl.inject(model, dl.DropLoRA(rank=8, alpha=16, drop_rate=0.5), key=key)


def model_input(batch):
    """What the loss is called with: also `step` and `rows`, where the batch has them."""
    filled = jnp.ones_like(batch["input_tokens"], dtype=bool)
    return {
        **batch,
        "positions": utils.build_positions_from_mask(filled),
        "attention_mask": utils.make_causal_attn_mask(filled),
    }


def loss(model, input_tokens, positions, attention_mask):
    logits, _ = model(input_tokens, positions, None, attention_mask)
    targets = input_tokens[:, 1:]
    return optax.softmax_cross_entropy_with_integer_labels(logits[:, :-1], targets).mean()


trainer = PeftTrainer(
    model, optax.adam(1e-2), TrainingConfig(eval_every_n_steps=10, max_steps=10)
).with_gen_model_input_fn(model_input)
trainer.with_loss_fn(masked_loss(loss, key))  # other masks at every step
trainer.eval_loss_fn = loss  # and none in evaluation

tokens = np.random.default_rng(0).integers(0, shape.vocab_size, (4, 16))
batch = {"input_tokens": tokens}
print(f"before: loss {loss(model, **model_input(batch)):.4f}")
trainer.train(numbered([batch] * 10), [batch])
print(f"after: loss {loss(dl.merge(model), **model_input(batch)):.4f}")
