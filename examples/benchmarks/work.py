"""What the sides have to do: a model's shape, rows of tokens, the factors to start from."""

from __future__ import annotations

import json
import math
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Literal

import numpy as np
from weights import numpy_values

LEARNING_RATE = 3e-4
WEIGHT_DECAY = 0.1
CLIP_NORM = 1.0
TARGETS = ("q_proj", "k_proj", "v_proj", "up_proj", "down_proj")


@dataclass(frozen=True)
class Shape:
    """A LLaMA, by the names of its `config.json`."""

    vocab_size: int
    hidden_size: int
    intermediate_size: int
    num_hidden_layers: int
    num_attention_heads: int
    num_key_value_heads: int
    # What Tunix computes with, whatever its configuration says.
    rope_theta: float = 1e6
    max_position_embeddings: int = 8192

    @property
    def hf(self) -> dict:
        fixed = {"tie_word_embeddings": False, "rms_norm_eps": 1e-5, "eos_token_id": None}
        return {**asdict(self), **fixed}

    @property
    def head_dim(self) -> int:
        return self.hidden_size // self.num_attention_heads

    def tensors(self) -> dict[str, tuple[int, ...]]:
        """Shapes by Hugging Face's names, [out, in]."""
        d, kv = self.hidden_size, self.num_key_value_heads * self.head_dim
        shapes = {
            "self_attn.q_proj": (d, d),
            "self_attn.k_proj": (kv, d),
            "self_attn.v_proj": (kv, d),
            "self_attn.o_proj": (d, d),
            "mlp.gate_proj": (self.intermediate_size, d),
            "mlp.up_proj": (self.intermediate_size, d),
            "mlp.down_proj": (d, self.intermediate_size),
            "input_layernorm": (d,),
            "post_attention_layernorm": (d,),
        }
        return {
            "model.embed_tokens.weight": (self.vocab_size, d),
            **{
                f"model.layers.{layer}.{name}.weight": shape
                for layer in range(self.num_hidden_layers)
                for name, shape in shapes.items()
            },
            "model.norm.weight": (d,),
            "lm_head.weight": (self.vocab_size, d),
        }

    @property
    def parameters(self) -> int:
        return sum(map(math.prod, self.tensors().values()))

    def useful_flops(self, rows: int, length: int) -> float:
        """Operations that one step on full rows needs, every position trained.

        Frozen weights: 2 a parameter and token forward, 2 for the gradient of the activations.
        Causal attention: two products forward and four backward, half of each. Nothing for what is
        computed again, for adapters, norms and the softmax, or for the embedding, a look-up.
        """
        matrices = (size for size in self.tensors().values() if len(size) == 2)
        products = sum(map(math.prod, matrices)) - self.vocab_size * self.hidden_size
        attention = 6 * length * self.hidden_size * self.num_hidden_layers
        return float(rows * length * (4 * products + attention))


SHAPES = {
    "dense": Shape(8192, 512, 1408, 8, 8, 4),
    "tiny": Shape(512, 64, 176, 2, 4, 2),
    "8b": Shape(128_256, 4096, 14_336, 32, 32, 8, rope_theta=500_000.0),
}


@dataclass(frozen=True)
class Row:
    """Tokens [n], and which of them are targets; the first never is."""

    ids: np.ndarray
    trained: np.ndarray


@dataclass(frozen=True)
class Padded:
    """Rows [B, T] as every PyTorch loop has them, padded to the longest of the batch.

    Attributes:
      tokens: all but the last of each row.
      targets: the token after each, or -1.
      mask: 0 in padding; None if there is none.
    """

    tokens: np.ndarray
    targets: np.ndarray
    mask: np.ndarray | None


@dataclass(frozen=True)
class Work:
    """What one turn is made of.

    Attributes:
      rows: a turn goes through all of them.
      batch: rows of a step, where they are padded.
      first: how many of the rows the first step of all takes, which is compared.
      line, lines: ours packs rows into so many lines of so many tokens a step; 0: it does not.
      folder: with `config.json` and the factors.
    """

    shape: Shape
    rows: tuple[Row, ...]
    batch: int
    first: int
    dtype: Literal["float32", "bfloat16"]
    device: Literal["cpu", "gpu"]
    folder: Path
    line: int = 0
    lines: int = 0

    def padded(self) -> Iterator[Padded]:
        for start in range(0, len(self.rows), self.batch):
            yield pad(self.rows[start : start + self.batch])

    @property
    def labels(self) -> int:
        return sum(int(row.trained.sum()) for row in self.rows)

    @property
    def tokens(self) -> int:
        return sum(len(row.ids) for row in self.rows)

    @property
    def weight_bytes(self) -> int:
        return self.shape.parameters * (4 if self.dtype == "float32" else 2)

    def factors(self, rank: int) -> Path:
        return self.folder / f"rank{rank}"


def pad(rows: Sequence[Row]) -> Padded:
    shape = (len(rows), max(len(row.ids) for row in rows) - 1)
    tokens, targets = np.zeros(shape, np.int64), np.full(shape, -1, np.int64)
    mask = np.zeros(shape, np.int64)
    for i, row in enumerate(rows):
        n = len(row.ids) - 1
        tokens[i, :n] = row.ids[:-1]
        targets[i, :n] = np.where(row.trained[1:], row.ids[1:], -1)
        mask[i, :n] = 1
    return Padded(tokens, targets, None if mask.all() else mask)


@dataclass(frozen=True)
class Tally:
    """What a side was given: tokens that have a next one, targets, and a sum over both.

    The sum is the same in any order, and another one if a token or a target is.
    """

    tokens: int = 0
    targets: int = 0
    digest: int = 0

    @staticmethod
    def of(tokens: np.ndarray, targets: np.ndarray, there: np.ndarray) -> Tally:
        pairs = tokens[there].astype(np.uint64) * np.uint64(0x9E3779B97F4A7C15)
        pairs ^= (targets[there] + 1).astype(np.uint64) * np.uint64(0xC2B2AE3D27D4EB4F)
        pairs ^= pairs >> np.uint64(29)
        pairs *= np.uint64(0xBF58476D1CE4E5B9)
        digest = int(pairs.sum(dtype=np.uint64))
        return Tally(int(there.sum()), int((targets[there] >= 0).sum()), digest)

    def __add__(self, other: Tally) -> Tally:
        digest = (self.digest + other.digest) % 2**64
        return Tally(self.tokens + other.tokens, self.targets + other.targets, digest)


@dataclass(frozen=True)
class Done:
    """The loss and the norm of the gradient of the last of some steps, and what they were given."""

    loss: float
    grad_norm: float
    steps: int
    given: Tally


def write_config(folder: Path, shape: Shape) -> None:
    config = {"architectures": ["LlamaForCausalLM"], "model_type": "llama", **shape.hf}
    (folder / "config.json").write_text(json.dumps(config))


def write_weights(folder: Path, shape: Shape) -> None:
    """For what reads a folder."""
    from safetensors.numpy import save_file

    tensors = {name: numpy_values(name, size) for name, size in shape.tensors().items()}
    save_file(tensors, folder / "model.safetensors", metadata={"format": "pt"})


def write_factors(folder: Path, shape: Shape, ranks: Iterable[int]) -> None:
    """A folder in PEFT's format for each rank; no factor is zero."""
    from safetensors.numpy import save_file

    for rank in ranks:
        tensors = {}
        for name, size in shape.tensors().items():
            module = name.removesuffix(".weight")
            if module.endswith(TARGETS):
                for part, own in {"lora_A": (rank, size[1]), "lora_B": (size[0], rank)}.items():
                    key = f"base_model.model.{module}.{part}.weight"
                    tensors[key] = numpy_values(key, own)
        target = folder / f"rank{rank}"
        target.mkdir()
        save_file(tensors, target / "adapter_model.safetensors", metadata={"format": "pt"})
        peft = {"peft_type": "LORA", "task_type": "CAUSAL_LM", "r": rank, "lora_alpha": 2 * rank}
        peft |= {"target_modules": list(TARGETS), "bias": "none", "lora_dropout": 0.0}
        (target / "adapter_config.json").write_text(json.dumps(peft))


def dense_rows(shape: Shape, rows: int, length: int) -> tuple[Row, ...]:
    """Random tokens, of which `length` have a target."""
    ids = np.random.default_rng(0).integers(0, shape.vocab_size, (rows, length + 1))
    trained = np.arange(length + 1) > 0
    return tuple(Row(own.astype(np.int32), trained) for own in ids)
