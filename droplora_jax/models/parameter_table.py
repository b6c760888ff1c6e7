"""The parameters of the decoder: path, logical axes, Hugging Face tensor, and who has them.

A new parameter of the layer is one row here and one line in `Layer.__init__`.

Why logical axes: a parameter says what each of its axes means (`heads`, `ffn`), and
`sharding.RULES` says over which axes of the mesh each meaning is split. So the model does not know
the mesh, and a mesh of another shape changes no line of the model. Two parameters that are
multiplied along an axis name it alike, and are then split alike, so that products need no
rearrangement. How the whole model is distributed is read, and changed, in one table of a dozen
rules.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from types import MappingProxyType

from droplora_jax.models.config import ModelConfig


@dataclass(frozen=True)
class TensorName:
    """The Hugging Face name of a parameter; `{layer}` stands for the layer's index."""

    pattern: str
    transposed: bool = False

    @property
    def stacked(self) -> bool:
        return "{layer}" in self.pattern

    def of_layer(self, layer: int) -> str:
        return self.pattern.format(layer=layer)

    @property
    def module(self) -> str:
        """The name of the module that owns the tensor."""
        return self.pattern.rsplit(".", 1)[0]


@dataclass(frozen=True)
class Parameter:
    """One parameter of the decoder.

    Attributes:
      path: its place in the model; parameters of `layers` are stacks of all layers.
      axes: the logical axes, for `sharding.RULES`.
      tensor: its name in LLaMA's checkpoints, and in those of all families that follow it.
      needs: the field of `ModelConfig` that has to be true; None: every model has it.
    """

    path: str
    axes: tuple[str, ...]
    tensor: TensorName
    needs: str | None = None

    def is_in(self, config: ModelConfig) -> bool:
        return self.needs is None or bool(getattr(config, self.needs))


def _norm(name: str, tensor: str, needs: str | None = None) -> Parameter:
    pattern = f"model.layers.{{layer}}.{tensor}.weight"
    return Parameter(f"layers.{name}.scale", ("layers", "norm"), TensorName(pattern), needs)


def _projection(name: str, module: str, axes: tuple[str, str], bias: str) -> Iterator[Parameter]:
    """Kernel and bias; what is added to the residual is replicated, as the residual's width is."""
    pattern, bias_axis = f"model.layers.{{layer}}.{module}.{name}", axes[1]
    weight = TensorName(f"{pattern}.weight", transposed=True)
    yield Parameter(f"layers.{name}.kernel", ("layers", *axes), weight)
    axis = "norm" if bias_axis == "width" else bias_axis
    yield Parameter(f"layers.{name}.bias", ("layers", axis), TensorName(f"{pattern}.bias"), bias)


_HEAD = TensorName("lm_head.weight", transposed=True)

PARAMETERS: tuple[Parameter, ...] = (
    Parameter("embed.embedding", ("vocab", "width"), TensorName("model.embed_tokens.weight")),
    _norm("attention_norm", "input_layernorm"),
    *_projection("q_proj", "self_attn", ("width", "heads"), "qkv_bias"),
    *_projection("k_proj", "self_attn", ("width", "heads"), "qkv_bias"),
    *_projection("v_proj", "self_attn", ("width", "heads"), "qkv_bias"),
    *_projection("o_proj", "self_attn", ("heads", "width"), "o_bias"),
    *_projection("gate_proj", "mlp", ("width", "ffn"), "mlp_bias"),
    *_projection("up_proj", "mlp", ("width", "ffn"), "mlp_bias"),
    *_projection("down_proj", "mlp", ("ffn", "width"), "mlp_bias"),
    _norm("q_norm", "self_attn.q_norm", "qk_norm"),
    _norm("k_norm", "self_attn.k_norm", "qk_norm"),
    _norm("mlp_norm", "post_attention_layernorm"),
    Parameter("final_norm.scale", ("norm",), TensorName("model.norm.weight")),
    Parameter("lm_head.kernel", ("width", "vocab"), _HEAD, "has_head"),
)

LOGICAL_AXES: MappingProxyType[str, tuple[str, ...]] = MappingProxyType(
    {parameter.path: parameter.axes for parameter in PARAMETERS}
)


def tensor_names(config: ModelConfig) -> dict[str, TensorName]:
    """The tensors of the parameters that a model of this shape has, by path."""
    return {p.path: p.tensor for p in PARAMETERS if p.is_in(config)}
