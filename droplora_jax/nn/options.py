"""Options of a step and of a quantised base, as plain data: this module imports no JAX.

None of them changes what a model means. `StepOptions` says how a forward and a backward pass are
computed, so it is given to the call and not to the model; `Quantization` says how many bits the
frozen kernels are stored in.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field
from typing import Literal, get_args

from droplora_jax.core.errors import raise_all
from droplora_jax.nn.layer_paths import Patterns

Kernel = Literal["auto", "blockwise", "splash", "tokamax", "cudnn"]
Remat = Literal["everything", "dots", "offload", "attention", "nothing"]
QuantizedKind = Literal["none", "int8", "int4", "nf4"]


@dataclass(frozen=True)
class StepOptions:
    """How a model's layers are computed; results are equal up to rounding.

    >>> options = StepOptions(remat="dots")
    >>> options.attention
    'auto'

    Attributes:
      packed: whether a row may hold several segments. False promises that each row is one segment
        followed by nothing but padding, so that attention need not compare segment ids.
      remat: what a layer saves for its backward pass, beside its input. everything: no
        recomputation; dots: matrix products and masks; offload: the same, in host memory;
        attention: attention's output only; nothing: recompute the whole layer.
      attention: the attention kernel; `auto` takes the fastest that the devices can run (see
        `nn.attention.dispatch.choose`).
    """

    packed: bool = True
    remat: Remat = "nothing"
    attention: Kernel = "auto"


@dataclass(frozen=True)
class Quantization:
    """How the linear layers of a base are stored; embedding, norms, biases and head stay as is.

    >>> quantization = Quantization("nf4", tile=64, pattern={"down_proj": "int8"})
    >>> quantization.of("layers.q_proj"), quantization.of("layers.down_proj")
    ('nf4', 'int8')
    >>> quantization.kinds
    ['nf4', 'int8']

    Attributes:
      kind: `none`, `int8`, `int4` or `nf4`.
      tile: inputs of a layer that share a scale.
      pattern: other kinds by pattern, searched in the paths of the layers (`layers.q_proj`, a stack
        of all layers, which is quantised as one); the first that matches counts.

    Raises:
      InputError: a kind that is not known, or a tile that is not an even number.
    """

    kind: str = "none"
    tile: int = 64
    pattern: Mapping[str, str] = field(default_factory=dict)

    def __post_init__(self) -> None:
        object.__setattr__(self, "pattern", Patterns(self.pattern))
        raise_all(self._problems())

    def _problems(self) -> Iterator[str]:
        kinds = get_args(QuantizedKind)
        by_pattern = {f"pattern.{pattern}": kind for pattern, kind in self.pattern.items()}
        for name, kind in {"kind": self.kind, **by_pattern}.items():
            if kind not in kinds:
                yield f"{name}={kind!r}: must be one of {', '.join(kinds)}"
        if self.tile < 2 or self.tile % 2:
            yield f"tile={self.tile}: must be an even number"

    @property
    def kinds(self) -> list[str]:
        """The kinds that are used, without `none`."""
        used = dict.fromkeys([self.kind, *self.pattern.values()])
        return [kind for kind in used if kind != "none"]

    def of(self, path: str) -> str:
        """The kind of the layer at a dotted path, such as `layers.q_proj`."""
        return Patterns(self.pattern).of((path,), self.kind)
