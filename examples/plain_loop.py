"""DropLoRA in a training loop of your own: nnx and optax, nothing else.

python examples/plain_loop.py MODEL_DIR OUTPUT_DIR
"""

import sys

import jax
import jax.numpy as jnp
import optax
from flax import nnx

import droplora_jax as dl

model_dir, out_dir = sys.argv[1:]
key = dl.root_key(0)

model = dl.load(model_dir, dtype=jnp.float32)
model = dl.inject(model, dl.DropLoRA(rank=8, alpha=16, drop_rate=0.5), key=key)
optimizer = nnx.Optimizer(model, optax.adam(1e-3), wrt=nnx.LoRAParam)

tokens = jax.random.randint(key, (4, 33), 0, model.config.vocab_size)
for step in range(10):

    def loss(model):
        logits = model(tokens[:, :-1])
        return optax.softmax_cross_entropy_with_integer_labels(logits, tokens[:, 1:]).mean()

    view = dl.masked(model, jax.random.fold_in(key, step), rows=jnp.arange(4))  # masks on
    value, gradients = nnx.value_and_grad(loss, argnums=nnx.DiffState(0, nnx.LoRAParam))(view)
    optimizer.update(model, gradients)
    print(f"step {step}: loss {value:.4f}")

print(dl.save_merged(model, out_dir))  # evaluation and export have no mask
