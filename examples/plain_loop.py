"""DropLoRA in a training loop of your own: python examples/plain_loop.py MODEL_DIR OUTPUT_DIR."""

import sys

import jax
import optax
from flax import nnx

import droplora_jax as dl

key = dl.root_key(0)
model = dl.load(sys.argv[1], dtype="float32")
model = dl.inject(model, dl.DropLoRA(rank=8, alpha=16, drop_rate=0.5), key=key)
optimizer = nnx.Optimizer(model, optax.adam(1e-3), wrt=nnx.LoRAParam)
tokens = jax.random.randint(key, (4, 33), 0, model.config.vocab_size)


@nnx.jit
def train_step(model, optimizer, step_key):
    def loss(model):
        logits = dl.masked(model, step_key, rows=jax.numpy.arange(4))(tokens[:, :-1])  # masks on
        return optax.softmax_cross_entropy_with_integer_labels(logits, tokens[:, 1:]).mean()

    value, gradients = nnx.value_and_grad(loss, argnums=nnx.DiffState(0, nnx.LoRAParam))(model)
    optimizer.update(model, gradients)
    return value


for step in range(10):
    print(f"loss {train_step(model, optimizer, jax.random.fold_in(key, step)):.4f}")
print(dl.save_merged(model, sys.argv[2]))  # evaluation and export have no mask
