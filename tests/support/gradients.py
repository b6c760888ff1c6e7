"""The loss of a model and its gradients, as plainly as can be."""

from __future__ import annotations

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx

import droplora_jax as dl
from droplora_jax.nn.options import StepOptions
from droplora_jax.training.loss import cross_entropy


def loss_and_gradients(model, tokens, key=None, options=StepOptions()):
    """Mean cross-entropy of the next token and its gradient for the adapters, by their paths."""
    graphdef, adapters, mask_keys, frozen = dl.split(model)

    @jax.jit
    def run(adapters, mask_keys, frozen, tokens):
        def loss(adapters):
            keys = mask_keys
            if key is not None:
                keys = dl.draw(mask_keys, key, rows=jnp.arange(tokens.shape[0]))
            logits = nnx.merge(graphdef, adapters, keys, frozen)(tokens, options=options)
            total, count = cross_entropy(logits[:, :-1], tokens[:, 1:])
            return total / count.astype(jnp.float32)

        return jax.value_and_grad(loss)(adapters)

    loss, gradients = run(adapters, mask_keys, frozen, jnp.asarray(tokens))
    return loss, {path: np.asarray(g[...]) for path, g in nnx.to_flat_state(gradients)}
