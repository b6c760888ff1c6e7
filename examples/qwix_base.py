"""DropLoRA on a base that Qwix quantised to 8 bits: python examples/qwix_base.py.

pip install "droplora-jax[quantized]"
"""

import jax
import jax.numpy as jnp
import optax
import qwix
from flax import nnx

import droplora_jax as dl


class Block(nnx.Module):
    def __init__(self, rngs: nnx.Rngs) -> None:
        self.norm = nnx.RMSNorm(64, rngs=rngs)
        self.up = nnx.Linear(64, 128, rngs=rngs)
        self.down = nnx.Linear(128, 64, rngs=rngs)

    def __call__(self, x):
        return x + self.down(nnx.silu(self.up(self.norm(x))))


class Model(nnx.Module):
    """Any flax.nnx model, with layers of any library that `dl.linear_spec` knows."""

    def __init__(self, rngs: nnx.Rngs) -> None:
        self.embed = nnx.Embed(50, 64, rngs=rngs)
        self.layers = nnx.List([Block(rngs) for _ in range(2)])
        self.head = nnx.Linear(64, 50, use_bias=False, rngs=rngs)

    def __call__(self, tokens):
        x = self.embed(tokens)
        for layer in self.layers:
            x = layer(x)
        return self.head(x)


key = dl.root_key(0)
tokens = jax.random.randint(key, (4, 17), 0, 50)
rows = jnp.arange(4)

# Adapters first, then Qwix: what it quantises are the frozen layers, each below its adapter.
config = dl.DropLoRA(rank=8, alpha=16, targets="(up|down)$", drop_rate=0.5)
model = dl.inject(Model(nnx.Rngs(0)), config, key=key)
rule = qwix.QuantizationRule(module_path=".*/base", weight_qtype=jnp.int8)
model = qwix.quantize_model(model, qwix.PtqProvider([rule]), tokens)
optimizer = nnx.Optimizer(model, optax.adam(1e-2), wrt=nnx.LoRAParam)


@nnx.jit
def loss_of(model):
    logits = model(tokens[:, :-1])
    return optax.softmax_cross_entropy_with_integer_labels(logits, tokens[:, 1:]).mean()


@nnx.jit
def train_step(model, optimizer, step_key):
    def loss(model):
        return loss_of(dl.masked(model, step_key, rows=rows))  # masks on, for one step

    value, gradients = nnx.value_and_grad(loss, argnums=nnx.DiffState(0, nnx.LoRAParam))(model)
    optimizer.update(model, gradients)
    return value


print(f"before: loss {loss_of(model):.4f}")
for step in range(20):
    train_step(model, optimizer, jax.random.fold_in(key, step))
print(f"after: loss {loss_of(model):.4f}")  # evaluation has no mask
for name, tensor in dl.interop.factors(model).items():  # as PEFT has them, to export
    print(name, tensor.shape)
