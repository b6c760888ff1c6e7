"""A run's configuration: the sections of its YAML as dataclasses."""

from __future__ import annotations

import re
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, field
from functools import reduce
from operator import or_
from typing import TYPE_CHECKING, Annotated, Any, Literal

from pydantic import AfterValidator, ConfigDict, Discriminator, Tag
from pydantic.dataclasses import dataclass as checked_dataclass
from pydantic_core import PydanticCustomError

from droplora_jax.adapters import ADAPTERS
from droplora_jax.adapters.config import LowRank
from droplora_jax.adapters.droplora import DropLoRA
from droplora_jax.core.config import DistributedConfig, MeshConfig
from droplora_jax.core.errors import InputError
from droplora_jax.data.config import DataConfig
from droplora_jax.nn.options import Kernel, Quantization, QuantizedKind
from droplora_jax.training.config import OptimConfig, TrainConfig


@contextmanager
def quantize_keys(section: str = "") -> Iterator[None]:
    """Name the fields of `Quantization` in an error by the keys of `BaseConfig`."""
    try:
        yield
    except InputError as error:
        problems = (re.sub(r"^kind\b", f"{section}quantize", p) for p in error.problems)
        key = rf"{section}quantize_\1"
        raise InputError(
            *(re.sub(r"\b(tile|pattern)(?=[=.])", key, p) for p in problems)
        ) from error


@dataclass(frozen=True)
class BaseConfig:
    """The base model.

    Attributes:
      path: a folder with `config.json`, safetensors and tokenizer; a bucket's URL; or a hub id.
      dtype: `bfloat16`, `float32`, or `auto`: bfloat16 on accelerators, float32 on CPU.
      revision: branch, tag or commit of a hub id.
      ignore_config_keys: keys of `config.json` that are known to change nothing; they are recorded
        with the adapter and in a merged folder.
      add_tokens: special tokens to add to the tokenizer. The row of a new one is the mean of the
        others, so embedding and head have to be trained (`adapter.train_whole: [embed, lm_head]`,
        or both among `adapter.targets`).
      adapter: an adapter in PEFT's format to train on from; its layers, ranks and scales stay, and
        the run's `adapter` says how its ranks are dropped.
      attention: the attention kernel: `splash` (TPU), `cudnn` (NVIDIA GPU), `tokamax` (NVIDIA GPU,
        only by its name), `blockwise` (any), or `auto`: the platform's first that can run.
      quantize: how the linear layers of the frozen base are stored.
      quantize_tile: inputs of a layer that share a scale; even, and a divisor of every layer's
        inputs.
      quantize_pattern: other kinds by pattern, searched in the layers' paths (`layers.down_proj`),
        such as `{down_proj: int8, o_proj: none}`; the first that matches counts.
    """

    path: str
    dtype: Literal["auto", "bfloat16", "float32"] = "auto"
    revision: str | None = None
    ignore_config_keys: tuple[str, ...] = ()
    add_tokens: tuple[str, ...] = ()
    adapter: str | None = None
    attention: Kernel = "auto"
    quantize: QuantizedKind = "none"
    quantize_tile: int = 64
    quantize_pattern: Mapping[str, QuantizedKind] = field(default_factory=dict)

    def __post_init__(self) -> None:
        with quantize_keys():
            self.quantization()

    def quantization(self) -> Quantization:
        return Quantization(self.quantize, self.quantize_tile, self.quantize_pattern)

    def dtype_on(self, platform: str) -> Literal["bfloat16", "float32"]:
        """The dtype on a platform of JAX, such as `cpu`."""
        if self.dtype != "auto":
            return self.dtype
        return "float32" if platform == "cpu" else "bfloat16"


if TYPE_CHECKING:
    AdapterOptions = LowRank
else:
    AdapterOptions = reduce(or_, (Annotated[cls, Tag(kind)] for kind, cls in ADAPTERS.items()))


def _kind(adapter: Any) -> str:
    """The adapter kind that a section names.

    A value that is not a section counts as `droplora`, so that the error says that a
    section is expected.
    """
    if isinstance(adapter, Mapping):
        return adapter.get("kind", "droplora")
    return getattr(adapter, "kind", "droplora")


def _seed(seed: int) -> int:
    """The seed, checked; a dataclass of pydantic's names the field itself."""
    if not 0 <= seed < 2**32:
        raise PydanticCustomError("seed", f"Input should be from 0 to {2**32 - 1}")
    return seed


@checked_dataclass(frozen=True, config=ConfigDict(extra="forbid", strict=True, allow_inf_nan=False))
class RunConfig:
    """One run, as its YAML describes it.

    Attributes:
      model: the base model.
      output: the folder of the run.
      data: what it is trained on.
      seed: of the initial adapters, the masks and the order of the data.
      adapter: what is trained.
      optim: how.
      train: how long.
      mesh: on which devices.
      distributed: in which processes.
    """

    model: BaseConfig
    output: str
    data: DataConfig
    seed: Annotated[int, AfterValidator(_seed)] = 0
    adapter: Annotated[AdapterOptions, Discriminator(_kind)] = field(default_factory=DropLoRA)
    optim: OptimConfig = field(default_factory=OptimConfig)
    train: TrainConfig = field(default_factory=TrainConfig)
    mesh: MeshConfig = field(default_factory=MeshConfig)
    distributed: DistributedConfig = field(default_factory=DistributedConfig)
