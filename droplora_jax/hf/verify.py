"""Whether an exported folder computes what was trained, in float32, one layer in memory."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from functools import partial
from pathlib import Path
from typing import Any, Protocol, runtime_checkable

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx

from droplora_jax.adapters.base import Adapter, base_path
from droplora_jax.adapters.fully_trained import Whole
from droplora_jax.adapters.low_rank_layer import Initial, PerLayer
from droplora_jax.adapters.surgery import view
from droplora_jax.core.errors import InputError
from droplora_jax.core.sharding import make_mesh
from droplora_jax.hf import source
from droplora_jax.hf.tensor_files import Each, TensorFiles, open_folder
from droplora_jax.hf.weight_loading import abstract_model, check_tensors
from droplora_jax.models.config import ModelConfig
from droplora_jax.models.decoder import Decoder
from droplora_jax.models.families import FAMILIES
from droplora_jax.models.layer import Layer, run_layers
from droplora_jax.models.parameter_table import TensorName
from droplora_jax.nn import ops, rope
from droplora_jax.nn.layer_paths import Path as ModulePath
from droplora_jax.nn.layer_paths import dotted
from droplora_jax.nn.mask_keys import DropShare, MaskKey
from droplora_jax.nn.options import Quantization
from droplora_jax.nn.quantized_kernel import Quantized, dense, quantize

TOLERANCE = 1e-4  # relative, of float32 logits; what was seen is around 1e-6
SHAPE = (2, 32)  # rows and positions of the probe
HEAD = "lm_head.weight"
VOCAB_CHUNK = 16_384  # rows of the head that are float32 at a time


@runtime_checkable
class Read(Protocol):
    """A stored tensor by its name, a slice of it, or its transpose, in float32."""

    def __call__(
        self, name: str, index: tuple[slice, ...] = (), transposed: bool = False
    ) -> np.ndarray: ...


def probe(model: Decoder, reference: Read, folder: Path, each: Each = map) -> float:
    """Compare the logits of `folder` with those of `model`'s own forward pass, adapters beside.

    Args:
      model: with adapters; its base weights may be shapes only.
      reference: the base's tensors, those with an adapter shifted by what the cast of their merge
        to the stored dtype took, so that rounding does not hide a merge that is wrong.
      folder: what was exported.
      each: a `map` to read with, such as that of a pool of threads.

    Returns:
      ||a - b|| / ||b|| of the logits on random tokens.

    Raises:
      InputError: it is above `TOLERANCE`.
    """
    ignored = model.source.ignored_config_keys if model.source else ()
    _, config = source.read_config(folder, ignored)
    mesh = make_mesh(devices=jax.local_devices()[:1])
    plain = abstract_model(config, mesh=mesh, dtype=jnp.float32)
    stored = open_folder(folder)
    check_tensors(stored, folder, plain)
    _check_head(stored, folder, config)

    def exported(name: str, index: tuple[slice, ...] = (), transposed: bool = False) -> np.ndarray:
        return stored.read(name, index, dtype=np.float32, transposed=transposed, each=each)

    tokens = np.random.default_rng(0).integers(0, config.vocab_size, SHAPE)
    expected = _logits(model, reference, tokens)
    actual = _logits(plain, exported, tokens)
    difference = float(np.linalg.norm(actual - expected) / np.linalg.norm(expected))
    if not difference <= TOLERANCE:
        raise InputError(
            f"{folder}: what was written does not compute what base + adapter do: their float32 "
            f"logits differ by {difference:.1e} (relative), more than {TOLERANCE:.0e}; nothing of "
            "it was kept. This is a defect, of the program or of the disk"
        )
    return difference


def over_quantized(
    model: Decoder, base: Read, quantization: Quantization, folder: Path, each: Each = map
) -> float:
    """How far a merged folder is from its adapter on the quantised base that it was trained over.

    Args:
      model, folder: as `probe` has them.
      base: the base's tensors.

    Returns:
      ||merged - quantised base with adapter|| / ||quantised base with adapter|| of the float32
      logits on random tokens.

    Raises:
      InputError: Qwix is not installed, or a tile that does not divide a layer's inputs.
    """
    names = FAMILIES[model.config.family].tensor_names(model.config)
    mesh = make_mesh(devices=jax.local_devices()[:1])
    shapes = abstract_model(model.config, mesh=mesh, dtype=jnp.float32, quantization=quantization)
    kinds = {
        names[dotted(path)].of_layer(layer): (value.kind, value.tile)
        for path, parameter in nnx.to_flat_state(nnx.state(shapes))
        if isinstance(value := parameter.get_value(), Quantized)
        for layer in range(model.config.layers)
    }

    def quantized(name: str, index: tuple[slice, ...] = (), transposed: bool = False) -> np.ndarray:
        if name not in kinds:
            return base(name, index, transposed)
        kernel_IO = base(name, transposed=True)
        out = np.asarray(_rounded(kernel_IO, *kinds[name]))
        return (out if transposed else out.T)[index]

    stored = open_folder(folder)

    def exported(name: str, index: tuple[slice, ...] = (), transposed: bool = False) -> np.ndarray:
        return stored.read(name, index, dtype=np.float32, transposed=transposed, each=each)

    plain = abstract_model(model.config, mesh=mesh, dtype=jnp.float32)
    tokens = np.random.default_rng(0).integers(0, model.config.vocab_size, SHAPE)
    trained = _logits(model, quantized, tokens)
    return float(
        np.linalg.norm(_logits(plain, exported, tokens) - trained) / np.linalg.norm(trained)
    )


@partial(jax.jit, static_argnums=(1, 2))
def _rounded(kernel_IO: jax.Array, kind: str, tile: int) -> jax.Array:
    """A kernel as its quantised values have it."""
    return dense(quantize(kernel_IO, kind, tile, jnp.float32))


def _check_head(stored: TensorFiles, folder: Path, config: ModelConfig) -> None:
    """Raise InputError if a tied model is stored with a head that is not its embedding.

    Some tools read the head where there is one, some the embedding: both have to be the same.
    """
    embedding = FAMILIES[config.family].tensor_names(config)["embed.embedding"].pattern
    if not config.tie_embeddings or HEAD not in stored.files:
        return
    for first in range(0, config.vocab_size, VOCAB_CHUNK):
        index = (slice(first, first + VOCAB_CHUNK),)
        if not np.array_equal(stored.read(HEAD, index), stored.read(embedding, index)):
            raise InputError(
                f"{folder}: {HEAD} is not {embedding}, but config.json ties them: tools differ in "
                "which they read. Nothing of it was kept. This is a defect of the program"
            )


def _logits(model: Decoder, read: Read, tokens_BT: np.ndarray) -> np.ndarray:
    """A model's logits with its base weights from `read`, one layer after the other."""
    config = model.config
    names = FAMILIES[config.family].tensor_names(config)
    positions_BT = jnp.broadcast_to(jnp.arange(tokens_BT.shape[1]), tokens_BT.shape)
    graphdef, state = nnx.split(_without_mesh(model.stacks[0]))

    @jax.jit
    def run(layer: nnx.State, x_BTD: jax.Array, window: jax.Array | None) -> jax.Array:
        rotation = rope.rotation_tables(config.rope, config.head_dim, positions_BT)
        return run_layers(nnx.merge(graphdef, layer), x_BTD, rotation, None, window)[0]

    @jax.jit
    def unembed(x_BTD: jax.Array, rows_VD: jax.Array) -> jax.Array:
        return x_BTD @ rows_VD.T

    ends = _adapted_ends(model, names, read)
    if "embed" in ends:
        x_BTD = jax.device_get(_called(ends["embed"], tokens_BT))
    else:
        x_BTD = _rows(names, read, tokens_BT)
    windows_L = config.windows_L
    for layer in range(config.layers):
        window = None if windows_L is None else windows_L[layer : layer + 1]
        x_BTD = run(_one_layer(state, names, layer, read), x_BTD, window)
    scale_D = read(names["final_norm.scale"].pattern)
    x_BTD = jax.jit(partial(ops.rms_norm, epsilon=config.norm_epsilon))(x_BTD, scale_D)
    if (head := "embed" if config.tie_embeddings else "lm_head") in ends:
        adapted = ends[head].transposed() if config.tie_embeddings else ends[head]
        return np.asarray(_called(adapted, x_BTD))
    head = names["embed.embedding" if config.tie_embeddings else "lm_head.kernel"].pattern
    chunks = [slice(v, v + VOCAB_CHUNK) for v in range(0, config.vocab_size, VOCAB_CHUNK)]
    return np.concatenate(
        [unembed(x_BTD, jnp.asarray(read(head, (chunk,)))) for chunk in chunks], axis=-1
    )


def _called(module: Callable[[jax.Array], jax.Array], inputs: jax.typing.ArrayLike) -> jax.Array:
    """What a module gives, compiled as one program."""
    graphdef, state = nnx.split(module)
    return jax.jit(lambda state, inputs: nnx.merge(graphdef, state)(inputs))(state, inputs)


def _rows(names: Mapping[str, TensorName], read: Read, tokens_BT: np.ndarray) -> np.ndarray:
    """The embedding's rows, and no others of it."""
    name = names["embed.embedding"].pattern
    rows = [read(name, (slice(token, token + 1),)) for token in tokens_BT.flat]
    return np.concatenate(rows).reshape(*tokens_BT.shape, -1)


def _adapted_ends(model: Decoder, names: Mapping[str, TensorName], read: Read) -> dict[str, Any]:
    """The embedding and the head, where they have adapters: their base weights from `read`."""
    ends = {name: getattr(model, name, None) for name in ("embed", "lm_head")}
    filled = {}
    for path, end in ends.items():
        if isinstance(end, Adapter):
            graphdef, state = nnx.split(end)
            own = nnx.map_state(partial(_filled, path, None, names, read), state)
            filled[path] = nnx.merge(graphdef, jax.tree.map(jnp.asarray, own))
    return filled


def _one_layer(
    stack: nnx.State, names: Mapping[str, TensorName], layer: int, read: Read
) -> nnx.State:
    """A stack of one layer: its base weights from `read`, its adapters those of `stack`."""
    return nnx.map_state(partial(_filled, "layers", layer, names, read), stack)


def _filled(
    owner: str,
    layer: int | None,
    names: Mapping[str, TensorName],
    read: Read,
    path: ModulePath,
    variable: nnx.Variable,
) -> nnx.Variable:
    """Fill one variable of a layer, or of a module outside the stack.

    Adapter state is sliced from the model; base weights come from `read`.
    """
    of_layer = slice(None) if layer is None else slice(layer, layer + 1)
    if isinstance(variable, PerLayer | Initial | DropShare):
        return variable.replace(variable.get_value()[of_layer])
    if isinstance(variable, MaskKey):
        return variable.replace(variable.get_value()[of_layer][..., :0])
    if isinstance(variable, nnx.LoRAParam) and not isinstance(variable, Whole):
        return variable.replace(jax.device_get(variable.get_value()[of_layer]))
    name = names[base_path((owner, *path))]
    value = read(name.of_layer(layer or 0), transposed=name.transposed)
    return variable.replace(value if layer is None else value[None])


def _without_mesh(layers: Layer) -> Layer:
    layers = view(layers)
    layers.mesh = None
    return layers
