"""What every kind of adapter is held to, and a few steps of training to hold it to that."""

from __future__ import annotations

from dataclasses import replace
from functools import lru_cache

import jax
import jax.numpy as jnp
import numpy as np
import optax
from flax import nnx
from oracles import random_tokens, relative

import droplora_jax as dl
from droplora_jax.adapters.surgery import initial_of
from droplora_jax.core.config import MeshConfig
from droplora_jax.core.sharding import make_mesh, put
from droplora_jax.nn.options import StepOptions
from droplora_jax.training.step import compile_train_step, init_state

STEPS, ROOT = 8, dl.root_key(5)
TOKENS = random_tokens(8, 17)


@lru_cache(maxsize=4)
def base_on(path, mesh: MeshConfig):
    """The model of a folder, loaded once for a mesh: no adapter writes on its arrays."""
    devices = make_mesh(mesh, jax.devices()[: int(np.prod(mesh.sizes))])
    return dl.load(path, mesh=devices, dtype=jnp.float32), devices


class Training:
    """A model with adapters, a few steps of which move all that is trained."""

    def __init__(self, folder, config, mesh: MeshConfig | None = None, remat="everything") -> None:
        mesh = mesh or MeshConfig(fsdp=1)
        self.base, self.mesh = base_on(folder.path, mesh)
        self.model = dl.inject(self.base, config, key=dl.root_key(1))
        self.graphdef, self.adapters, self.mask_keys, self.frozen = dl.split(self.model)
        # What is small beside `eps` is not blown up to a whole step, with the rounding that is in it.
        self.tx = optax.adam(0.02, eps=1e-4)
        share = config.share(STEPS)
        options = StepOptions(remat=remat)
        self.compiled = compile_train_step(
            self.graphdef, self.tx, self.adapters, share, options=options
        )

    def fresh(self):
        state = init_state(jax.tree.map(jnp.copy, self.adapters), self.tx)
        return replace(state, initial=initial_of(self.frozen))

    def steps(self, number: int, *, state=None, k: int = 2):
        """The state and losses after some more steps, on the same rows in `k` microbatches."""
        state = self.fresh() if state is None else state
        parts = {
            "tokens": TOKENS[:, :-1].reshape(k, -1, 16),
            "targets": TOKENS[:, 1:].reshape(k, -1, 16),
            "segment_ids": np.ones((k, 8 // k, 16), np.int32),
        }
        batch = {
            name: put(value, (None, "batch", "position"), self.mesh)
            for name, value in parts.items()
        }
        frozen = nnx.merge_state(self.frozen, state.initial)
        initial, state = state.initial, replace(state, initial=None)
        losses = []
        for _ in range(number):
            state, metrics = self.compiled(state, self.mask_keys, frozen, batch, ROOT)
            losses.append(float(metrics["loss"]))
        return replace(state, initial=initial), losses

    def with_state(self, state):
        frozen = nnx.merge_state(self.frozen, state.initial)
        return nnx.merge(self.graphdef, state.adapters, self.mask_keys, frozen)


@jax.jit
def _logits(model):
    return model(jnp.asarray(TOKENS))


def logits(model) -> np.ndarray:
    """One program for all models of the same structure."""
    return np.asarray(_logits(model))


def pairs(old, new):
    new = dict(nnx.to_flat_state(new))
    return {p: (np.asarray(v[...]), np.asarray(new[p][...])) for p, v in nnx.to_flat_state(old)}


def assert_merge_is_evaluation(training: Training, state) -> None:
    """The model was unchanged at first, has changed since, and is what its merge is."""
    before = logits(training.base)
    assert relative(logits(training.model), before) < 2e-6
    model = training.with_state(state)
    after = logits(model)
    assert relative(after, before) > 1e-3
    merged = dl.merge(model)
    assert nnx.graphdef(merged) == nnx.graphdef(training.base)
    assert relative(logits(merged), after) < 1e-5


# The same properties on three stacked layers: the least that shows all that a kind may depend on.


class Layer(nnx.Module):
    def __init__(self, *, rngs: nnx.Rngs) -> None:
        for name in ("q_proj", "up_proj", "down_proj"):
            setattr(self, name, nnx.Linear(12, 12, rngs=rngs))

    def __call__(self, x):
        return x + self.down_proj(jnp.tanh(self.up_proj(self.q_proj(x))))


class Stack(nnx.Module):
    def __init__(self) -> None:
        @nnx.split_rngs(splits=3)
        @nnx.vmap(in_axes=(0,), out_axes=0)
        def make(rngs: nnx.Rngs) -> Layer:
            return Layer(rngs=rngs)

        self.layers = make(nnx.Rngs(0))

    def __call__(self, x):
        graphdef, state = nnx.split(self.layers)
        return jax.lax.scan(lambda x, of: (nnx.merge(graphdef, of)(x), None), x, state)[0]


INPUT = jax.random.normal(dl.root_key(3), (8, 5, 12))


@jax.jit
def output(model):
    return model(INPUT)


@jax.jit
def both_outputs(model, key, share):
    """In evaluation, and with the masks of a step."""
    return model(INPUT), dl.masked(model, key, rows=jnp.arange(8), share=share)(INPUT)


@jax.jit
def small_step(graphdef, adapters, mask_keys, frozen, key, share):
    """One that moves every number that has a gradient."""

    def loss(adapters):
        keys = dl.draw(mask_keys, key, rows=jnp.arange(8), share=share)
        return jnp.mean((nnx.merge(graphdef, adapters, keys, frozen)(INPUT) - 1) ** 2)

    gradients = jax.grad(loss)(adapters)
    return jax.tree.map(lambda value, g: value - 0.03 * jnp.sign(g), adapters, gradients)
