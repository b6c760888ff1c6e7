"""What the tests compare against: transformers, PEFT, a few lines of PyTorch; and small helpers."""

from __future__ import annotations

import json
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import torch
import transformers
from beartype import BeartypeConf, beartype
from flax import nnx

checked = beartype(conf=BeartypeConf(is_pep484_tower=True))  # an int where a float is asked is fine

TINY = {
    "vocab_size": 64,
    "hidden_size": 32,
    "intermediate_size": 48,
    "num_hidden_layers": 3,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "max_position_embeddings": 512,
}


@dataclass(frozen=True)
class Folder:
    """A Hugging Face folder, and the model that transformers saved there."""

    path: Path
    torch: Any

    def logits(self, tokens: np.ndarray, attention_mask: np.ndarray | None = None) -> np.ndarray:
        return torch_logits(self.torch, tokens, attention_mask)


def model_folder(
    path: Path, model_type: str = "llama", *, dtype: torch.dtype = torch.float32, **overrides: Any
) -> Folder:
    """A model of random weights, large enough for every part to matter, in several shards."""
    with torch.random.fork_rng():
        torch.manual_seed(0)
        config = transformers.AutoConfig.for_model(model_type, **{**TINY, **overrides})
        model = transformers.AutoModelForCausalLM.from_config(config).eval()
        with torch.no_grad():
            for parameter in model.parameters():
                if parameter.ndim == 1:
                    parameter.add_(0.2 * torch.randn_like(parameter))
                else:
                    parameter.normal_(0.0, parameter.shape[1] ** -0.5)
            model.get_input_embeddings().weight.normal_(0.0, 0.5)
    model = model.to(dtype)
    model.save_pretrained(path, max_shard_size="40KB")
    return Folder(path, model)


def with_config(source: Path, target: Path, **changes: Any) -> Path:
    """A folder of another's files, with other values in its `config.json`.

    `None` removes a key.
    """
    target.mkdir(exist_ok=True)
    for file in source.iterdir():
        if file.name != "config.json":
            (target / file.name).hardlink_to(file)
    config = json.loads((source / "config.json").read_text()) | changes
    config = {key: value for key, value in config.items() if value is not None}
    (target / "config.json").write_text(json.dumps(config))
    return target


def torch_logits(
    model: Any, tokens: np.ndarray, attention_mask: np.ndarray | None = None
) -> np.ndarray:
    mask = None if attention_mask is None else torch.tensor(attention_mask)
    with torch.no_grad():
        return model(torch.tensor(tokens), attention_mask=mask).logits.float().numpy()


def torch_lowrank(x, w, a, b, m, scale):
    """The method in PyTorch, from its formula."""
    return x @ w + scale * (((x @ a) * m) @ b)


def relative(a: Any, b: Any) -> float:
    """||a - b|| / ||b||, in float64."""
    a, b = (np.asarray(value).astype(np.float64) for value in (a, b))
    assert a.shape == b.shape
    return float(np.linalg.norm(a - b) / np.linalg.norm(b))


def random_tokens(*shape: int, seed: int = 0) -> np.ndarray:
    return np.random.default_rng(seed).integers(1, TINY["vocab_size"], shape, dtype=np.int32)


def randomized(model: nnx.Module, *, seed: int = 0, size: float = 0.3) -> nnx.Module:
    """The model with other values in its adapters' factors (B is no longer zero)."""
    rng = np.random.default_rng(seed)

    def fill(_, parameter):
        value = rng.normal(0.0, size, parameter[...].shape).astype(np.float32)
        return parameter.replace(jax.device_put(value, parameter[...].sharding))

    graphdef, adapters, rest = nnx.split(model, nnx.LoRAParam, ...)
    return nnx.merge(graphdef, nnx.map_state(fill, adapters), rest)


def snapshot(model: nnx.Module) -> tuple[Any, dict[Any, np.ndarray]]:
    """All that a mutation would change: the graph, and every value."""
    graphdef, state = nnx.split(model)
    return graphdef, {path: raw(v.get_value()) for path, v in nnx.to_flat_state(state)}


def assert_unchanged(model: nnx.Module, before: tuple[Any, dict[Any, np.ndarray]]) -> None:
    graphdef, values = snapshot(model)
    assert graphdef == before[0]
    assert values.keys() == before[1].keys()
    for path, value in values.items():
        np.testing.assert_array_equal(value, before[1][path], err_msg=str(path))


def raw(value: Any) -> np.ndarray:
    """An array of numbers or of keys as numpy."""
    if jnp.issubdtype(value.dtype, jax.dtypes.prng_key):
        value = jax.random.key_data(value)
    return np.asarray(value)


def primitives(jaxpr: Any) -> set[str]:
    """The names of all primitives in a jaxpr and in the jaxprs inside it."""
    return {equation.primitive.name for equation in equations(jaxpr)}


def equations(jaxpr: Any) -> Iterator[Any]:
    jaxpr = getattr(jaxpr, "jaxpr", jaxpr)
    for equation in jaxpr.eqns:
        yield equation
        for value in equation.params.values():
            for inner in value if isinstance(value, (tuple, list)) else [value]:
                if hasattr(getattr(inner, "jaxpr", inner), "eqns"):
                    yield from equations(inner)


RANDOM = frozenset({"random_bits", "random_fold_in", "random_wrap", "threefry2x32"})
