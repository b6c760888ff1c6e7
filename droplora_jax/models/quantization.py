"""Which kernels of a base are quantised, and how."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any, TypeVar, get_args

from flax import nnx

from droplora_jax.core.errors import InputError
from droplora_jax.nn.layer_paths import Patterns, check_patterns, dotted
from droplora_jax.nn.quantized_kernel import Kind, shapes

Model = TypeVar("Model", bound=nnx.Module)


@dataclass(frozen=True)
class Quantization:
    """How the linear layers of a base are stored; embedding, norms, biases and head stay as is.

    Attributes:
      kind: `none`, `int8`, `int4` or `nf4`.
      tile: inputs of a layer that share a scale.
      pattern: other kinds by pattern, searched in the paths of the layers (`layers.q_proj`, a stack
        of all layers, which is quantised as one); the first that matches counts.
    """

    kind: str = "none"
    tile: int = 64
    pattern: Mapping[str, str] = field(default_factory=dict)

    def __post_init__(self) -> None:
        object.__setattr__(self, "pattern", Patterns(self.pattern))
        kinds = get_args(Kind)
        for name, kind in {"": self.kind, **self.pattern}.items():
            if kind not in kinds:
                key = f"model.quantize_pattern.{name}" if name else "model.quantize"
                raise InputError(f"{key}={kind!r}: must be one of {', '.join(kinds)}")
        if self.tile < 2 or self.tile % 2:
            raise InputError(f"model.quantize_tile={self.tile}: must be an even number")

    @property
    def kinds(self) -> list[str]:
        """Those that are used, without `none`."""
        used = dict.fromkeys([self.kind, *self.pattern.values()])
        return [kind for kind in used if kind != "none"]

    def shapes(self, model: Model) -> Model:
        """A model of shapes with the shapes of quantised kernels, changed in place.

        Raises:
          InputError: a pattern that matches nothing, or a tile that does not divide a layer's
            inputs.
        """
        layers = {
            dotted(path): node
            for path, node in nnx.iter_graph(model)
            if isinstance(node, nnx.Linear)
        }
        names = {(path,): [(path,)] for path in layers}
        check_patterns({"quantize_pattern": tuple(self.pattern)}, names, section="model")
        for path, layer in layers.items():
            kind = Patterns(self.pattern).of((path,), self.kind)
            if kind != "none":
                layer.kernel = nnx.Param(self._shapes(path, layer, kind))
        return model

    def _shapes(self, path: str, layer: nnx.Linear, kind: str) -> Any:
        kernel: Any = layer.kernel.get_value()
        width_in = kernel.shape[-2]
        if width_in % self.tile:
            raise InputError(
                f"model.quantize_tile={self.tile}: must divide the {width_in} inputs of {path}; "
                f"take another tile, or leave the layer as it is: "
                f"model.quantize_pattern.{path.rpartition('.')[2]}=none"
            )
        return shapes(kernel, kind, self.tile)
