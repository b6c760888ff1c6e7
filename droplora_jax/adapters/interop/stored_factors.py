"""The factors of any model with adapters, where no table of names leads to Hugging Face's."""

from __future__ import annotations

import numpy as np
from flax import nnx

from droplora_jax.adapters.low_rank_layer import LowRankLinear
from droplora_jax.core import distributed
from droplora_jax.core.errors import InputError
from droplora_jax.nn.layer_paths import dotted, layer_names

# The names of what an adapter of a linear layer stores, as PEFT's files have them; its attributes.
A, B, MAGNITUDE = ".lora_A.weight", ".lora_B.weight", ".lora_magnitude_vector"
LINEAR = {A: "lora_a", B: "lora_b", MAGNITUDE: "magnitude"}


def factors(model: nnx.Module) -> dict[str, np.ndarray]:
    """lora_A [r, in] and lora_B [out, r] of every adapted layer, laid out as PEFT does.

    Under the layer's own name with the index of a stack in it: `layers.3.q_proj.lora_A.weight`;
    DoRA's magnitude [out] too. Kernels of several input or output dimensions are flattened, as a
    plain linear layer has them. A branch whose initial factors are subtracted has twice the rank.

    Raises:
      InputError: a kernel with a dimension that is both the input's and the output's.
    """
    tensors: dict[str, np.ndarray] = {}
    for path, adapter in nnx.iter_graph(model):
        if not isinstance(adapter, LowRankLinear):
            continue
        if adapter.spec.batched:
            raise InputError(f"{dotted(path)}: a kernel of several experts is no single matrix")
        names = layer_names(path, adapter.stack)
        stored = {name: distributed.to_host(value) for name, value in adapter.stored().items()}
        width = stored["lora_a"].shape[-1]
        shapes = {A: (len(names), -1, width), B: (len(names), width, -1)}
        for part, attribute in LINEAR.items():
            if attribute not in stored:
                continue
            layers = stored[attribute].reshape(shapes.get(part, (len(names), -1)))
            for layer, adapted in enumerate(adapter.adapted):
                ranks = adapter.ranks_of(layer)
                index = {A: (slice(None), ranks), B: (ranks,)}.get(part, ())
                if adapted:
                    tensor = np.ascontiguousarray(layers[layer][index].T)
                    tensors[names[layer][-1] + part] = tensor
    return tensors
