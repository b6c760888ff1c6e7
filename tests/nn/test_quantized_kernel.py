"""Kernels of few bits: Qwix's numbers, gradients of the same model in full, and what is in memory."""

from __future__ import annotations

import ctypes
import gc
from functools import partial
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import qwix
import scipy.stats
from flax import nnx
from oracles import Folder, equations, model_folder, random_tokens, randomized, relative

import droplora_jax as dl
from droplora_jax.adapters.base import Adapter
from droplora_jax.core.config import MeshConfig
from droplora_jax.core.sharding import make_mesh
from droplora_jax.models.families import FAMILIES
from droplora_jax.models.layer import REMAT_POLICIES, Linear
from droplora_jax.nn.options import StepOptions
from droplora_jax.nn.quantized_kernel import NF4_LEVELS, Quantized, dense, leaves, quantize
from droplora_jax.runs.planning.flops import matrix_flops
from droplora_jax.training.step import eval_step, loss_and_gradients

KINDS = ("int8", "int4", "nf4")
TILE = 16
ONE, CUBE = MeshConfig(fsdp=1), MeshConfig(data=2, fsdp=2, tensor=2)
MESHES = {
    "1": ONE,
    "2x2x2": CUBE,
    "tiles across devices": MeshConfig(fsdp=8),
    "context": MeshConfig(fsdp=2, tensor=2, context=2),
}
KEY = dl.root_key(3)
each_kind = pytest.mark.parametrize("kind", KINDS)


def kernel(*shape: int, seed: int = 0) -> jax.Array:
    return jnp.asarray(np.random.default_rng(seed).normal(0.0, 0.02, shape), jnp.float32)


def load(folder: Folder, mesh: MeshConfig = ONE, kind: str = "nf4", **options) -> nnx.Module:
    devices = jax.devices()[: 1 if mesh == ONE else 8]
    how = dl.Quantization(kind, TILE, options.pop("pattern", {}))
    options = {"dtype": jnp.float32, **options}
    return dl.load(folder.path, mesh=make_mesh(mesh, devices), quantize=how, **options)


def adapted(model: nnx.Module, config=dl.DropLoRA, **options) -> nnx.Module:
    options = {"rank": 4, "alpha": 8.0, "targets": "all-linear", **options}
    return randomized(dl.inject(model, config(**options), key=KEY), size=0.2)


def in_full(model: nnx.Module) -> nnx.Module:
    """The same model with arrays for its quantised kernels."""

    def fill(_, parameter):
        value = parameter.get_value()
        if not isinstance(value, Quantized):
            return parameter
        return parameter.replace(jax.jit(dense, out_shardings=value.sharding)(value))

    graphdef, state = nnx.split(model)
    return nnx.merge(graphdef, nnx.map_state(fill, state))


def kernels(model: nnx.Module) -> dict[str, Quantized]:
    flat = nnx.to_flat_state(nnx.state(model))
    values = {".".join(map(str, path)): variable.get_value() for path, variable in flat}
    return {path: value for path, value in values.items() if isinstance(value, Quantized)}


# The numbers.


def test_the_levels_are_those_of_the_paper():
    """Quantiles of a normal distribution, 8 above zero and 7 below it, over the largest of them."""
    normal, offset = scipy.stats.norm.ppf, 0.9677083
    above = normal(np.linspace(offset, 0.5, 9)[:-1])
    below = -normal(np.linspace(offset, 0.5, 8)[:-1])
    levels = np.sort([*below, 0.0, *above]) / above.max()
    np.testing.assert_allclose(NF4_LEVELS, levels, atol=1e-6)


@pytest.mark.parametrize(("kind", "tile"), [("int8", 16), ("int4", 64), ("nf4", 16), ("nf4", 64)])
def test_quantised_and_back_as_qwix_does(kind, tile):
    w = kernel(128, 24)
    ours = quantize(w, kind, tile, jnp.float32)
    qtype = {"int8": jnp.int8, "int4": jnp.int4}.get(kind, kind)
    theirs = qwix.quantize(w, qtype, channelwise_axes=(1,), tiled_axes={0: tile})
    assert (ours.tile, ours.shape, ours.dtype) == (tile, w.shape, jnp.float32)
    np.testing.assert_array_equal(ours.scales, theirs.scale)
    np.testing.assert_array_equal(dense(ours), qwix.dequantize(theirs))


@each_kind
def test_the_error_is_what_the_format_allows(kind):
    w = kernel(4096, 8)
    of_kind = quantize(w, kind, 64, jnp.float32)
    error = np.abs(dense(of_kind) - w).reshape(64, 64, 8)
    step = np.asarray(of_kind.scales)[:, None, :]
    widest = max(np.diff(NF4_LEVELS)) if kind == "nf4" else 1.0
    rounding = np.abs(np.asarray(w)).reshape(error.shape) * 2.0**-22
    assert (error <= step * widest / 2 + rounding).all()
    rms = {"int8": 0.007, "int4": 0.12, "nf4": 0.1}[kind]  # of normal weights, relative
    assert 0.5 * rms < relative(dense(of_kind), w) < rms


@each_kind
def test_a_tile_of_zeros_and_a_model_in_bfloat16(kind):
    assert not np.asarray(dense(quantize(jnp.zeros((16, 3)), kind, 16, jnp.float32))).any()
    w = kernel(64, 8)
    half = quantize(w, kind, 64, jnp.bfloat16)
    assert half.scales.dtype == dense(half).dtype == jnp.bfloat16
    full = quantize(w, kind, 64, jnp.float32)
    np.testing.assert_array_equal(half.values, full.values)
    assert relative(dense(half), dense(full)) < 2**-8
    np.testing.assert_array_equal(half.astype(jnp.float32).scales, half.scales)


@pytest.mark.parametrize(("kind", "bits"), [("int8", 8), ("int4", 4), ("nf4", 4)])
def test_bits_are_what_the_compiler_holds(kind, bits):
    found = quantize(kernel(256, 256), kind, 64, jnp.bfloat16)
    compiled = jax.jit(lambda kernel: dense(kernel).sum()).lower(found).compile()
    scales = 2 * 256 * 256 // 64
    assert compiled.memory_analysis().argument_size_in_bytes == 256 * 256 * bits // 8 + scales


# Onto the mesh.


@pytest.mark.parametrize(
    ("kind", "mesh"),
    list(zip(("int4", "int8", "nf4", "int8"), MESHES.values(), strict=True)),
    ids=MESHES.keys(),
)
def test_what_is_loaded_is_the_folder_quantised(kind, mesh, untied):
    model = load(untied, mesh, kind)
    names, stored = FAMILIES["llama"].tensor_names(model.config), untied.torch.state_dict()
    found = kernels(model)
    assert len(found) == 7
    for path, stack in found.items():
        for layer in range(3):
            theirs = jnp.asarray(stored[names[path].of_layer(layer)].numpy().T)
            expected = quantize(theirs, kind, TILE, jnp.float32)
            np.testing.assert_array_equal(stack.values[layer], expected.values)
            np.testing.assert_array_equal(stack.scales[layer], expected.scales)
    plain = dl.load(untied.path, mesh=model.mesh, dtype=jnp.float32)
    for path, stack in found.items():
        name = path.split(".")[1]
        assert stack.sharding == getattr(plain.layers, name).kernel[...].sharding


def _peak(work) -> int:
    """Bytes by which the process grows at most."""
    status = Path("/proc/self/status")

    def of(name: str) -> int:
        lines = status.read_text().splitlines()
        return 1024 * int(next(line for line in lines if line.startswith(name)).split()[1])

    gc.collect()
    ctypes.CDLL(None).malloc_trim(0)  # or what was freed before would serve again, unseen
    Path("/proc/self/clear_refs").write_text("5")  # the peak is from now on
    before = of("VmRSS")
    work()
    return of("VmHWM") - before


@pytest.mark.skipif(not Path("/proc/self/clear_refs").exists(), reason="needs Linux")
def test_the_whole_is_never_in_memory(tmp_path):
    folder = model_folder(
        tmp_path, hidden_size=256, intermediate_size=1024, num_hidden_layers=24, vocab_size=64
    )
    load(folder)  # what is compiled and cached
    weights = sum(p.numel() for p in folder.torch.model.layers.parameters()) * 4
    kept = []
    peak = _peak(lambda: kept.append(load(folder)))
    resident = sum(x.nbytes for x in jax.tree.leaves(nnx.state(kept[0])))
    assert resident < weights / 5
    assert peak < weights / 2
    assert _peak(lambda: kept.append(load(folder, kind="none"))) > 0.9 * weights


# What is computed.


def batch(rows: int = 8, length: int = 16) -> dict[str, np.ndarray]:
    tokens = random_tokens(rows, length)
    return {
        "tokens": tokens,
        "targets": np.roll(tokens, -1, axis=1),
        "segment_ids": np.ones_like(tokens),
    }


differentiated = jax.jit(loss_and_gradients, static_argnums=0, static_argnames="options")
evaluate = jax.jit(eval_step, static_argnums=0)


def gradients(model: nnx.Module, remat="nothing") -> tuple[float, np.ndarray]:
    parts = dl.split(model)
    rows = {k: v[None] for k, v in batch().items()}
    loss, found = differentiated(*parts, rows, KEY, options=StepOptions(remat=remat))
    return float(loss), np.concatenate([np.ravel(x) for x in jax.tree.leaves(found)])


@nnx.jit
def logits(model: nnx.Module, tokens: jax.Array) -> jax.Array:
    return model(tokens)


def evaluated(model: nnx.Module) -> float:
    graphdef, *state = dl.split(model)
    total, count = evaluate(graphdef, *state, batch())
    return float(total) / int(count)


@pytest.mark.parametrize(
    ("config", "mesh"),
    [*((dl.DropLoRA, mesh) for mesh in MESHES.values() if mesh is not ONE), (dl.DoRA, ONE)],
)
def test_loss_and_gradients_are_those_of_the_same_model_in_full(config, mesh, untied):
    model = adapted(load(untied, mesh), config)
    loss, found = gradients(model)
    expected, theirs = gradients(in_full(model))
    assert abs(loss - expected) < 1e-6 * expected
    assert relative(found, theirs) < 1e-6
    if mesh is CUBE:  # a forward pass is in the gradients' of every mesh
        assert abs(evaluated(model) - evaluated(in_full(model))) < 1e-6 * expected
        assert abs(evaluated(model) - loss) > 1e-3  # a mask was on


@pytest.mark.parametrize(
    ("kind", "remat"), [("int8", "nothing"), ("int4", "dots"), ("nf4", "everything")]
)
def test_whatever_is_saved(kind, remat, untied):
    model = adapted(load(untied, kind=kind))
    loss, found = gradients(model, remat)
    expected, theirs = gradients(in_full(model))
    assert abs(loss - expected) < 1e-6 * expected
    assert relative(found, theirs) < 1e-6


@pytest.mark.parametrize(
    ("config", "remat"),
    [(dl.DoRA, "everything"), *((dl.DropLoRA, remat) for remat in ("everything", *REMAT_POLICIES))],
)
def test_no_stack_of_kernels_is_an_array_in_the_step(config, remat, untied):
    """Neither in the forward pass nor saved for the backward one."""
    model, options = adapted(load(untied), config), StepOptions(remat=remat)
    graphdef, *state = dl.split(model)
    parts = {k: v[None] for k, v in batch().items()}

    def made(model_state) -> set:
        step = partial(loss_and_gradients, graphdef, batch=parts, step_key=KEY, options=options)
        found = equations(jax.make_jaxpr(step)(*model_state))
        outputs = [out.aval for equation in found for out in equation.outvars]
        return {x.shape for x in outputs if jnp.issubdtype(x.dtype, jnp.floating)}

    stacks = {value.shape for value in kernels(model).values()}
    shapes = made(state)
    assert {shape[1:] for shape in stacks} < shapes  # one layer at a time
    assert not stacks & shapes


def test_products_are_as_many(untied):
    model = adapted(load(untied))

    def count(model):
        graphdef, *state = dl.split(model)
        parts = {k: v[None] for k, v in batch().items()}
        step = lambda *state: loss_and_gradients(graphdef, *state, parts, KEY)  # noqa: E731
        return matrix_flops(jax.make_jaxpr(step)(*state))

    assert count(model) == count(in_full(model))


def test_only_adapters_are_trained(untied):
    _, adapters, _, frozen = dl.split(adapted(load(untied)))
    assert not any(isinstance(leaf, Quantized) for leaf in leaves(adapters))
    assert sum(isinstance(leaf, Quantized) for leaf in leaves(frozen)) == 7


# Adapters beside it.


@pytest.mark.parametrize(("config", "mesh"), [(dl.DropLoRA, ONE), (dl.DoRA, CUBE)])
def test_adapters_start_and_lie_as_beside_the_plain_base(config, mesh, untied):
    plain = dl.load(untied.path, mesh=load(untied, mesh).mesh, dtype=jnp.float32)
    ours, theirs = (
        nnx.to_flat_state(dl.split(dl.inject(model, config(rank=4), key=KEY))[1])
        for model in (load(untied, mesh), plain)
    )
    for (path, one), (other_path, other) in zip(ours, theirs, strict=True):
        assert path == other_path
        assert one[...].sharding == other[...].sharding
        if path[-1] != "magnitude":
            np.testing.assert_array_equal(one[...], other[...])


def test_magnitudes_are_the_norms_of_what_is_there(untied):
    model = load(untied, kind="int4")
    injected = dl.inject(model, dl.DoRA(rank=4), key=KEY)
    for path, stack in kernels(model).items():
        name = path.split(".")[1]
        if isinstance(layer := getattr(injected.layers, name), Adapter):
            norm = np.linalg.norm(np.asarray(dense(stack)), axis=1)
            np.testing.assert_allclose(layer.magnitude[...], norm, rtol=1e-6)
    tokens = jnp.asarray(random_tokens(2, 16))
    assert relative(logits(injected, tokens), logits(model, tokens)) < 1e-5


def test_starts_from_the_kernel_that_is_there(untied):
    model = load(untied)
    config = dl.DropLoRA(rank=4, init="pissa")
    ours, theirs = (
        nnx.to_flat_state(dl.split(dl.inject(base, config, key=KEY))[1])
        for base in (model, in_full(model))
    )
    for (_, one), (_, other) in zip(ours, theirs, strict=True):
        assert relative(one[...], other[...]) < 1e-5
    tokens = jnp.asarray(random_tokens(2, 16))
    assert relative(logits(dl.inject(model, config, key=KEY), tokens), logits(model, tokens)) < 1e-5


@pytest.mark.parametrize("config", [dl.DropLoRA, dl.DoRA])
def test_merged_in_memory_it_is_a_plain_model(config, untied):
    model = adapted(load(untied), config, targets="paper")
    merged = dl.merge(model)
    assert {path.split(".")[1] for path in kernels(merged)} == {"o_proj", "gate_proj"}
    assert type(merged.layers.q_proj) is Linear
    assert merged.layers.q_proj.kernel[...].dtype == jnp.float32
    tokens = jnp.asarray(random_tokens(2, 16))
    assert relative(logits(merged, tokens), logits(model, tokens)) < 1e-5


@pytest.mark.parametrize("config", [dl.DropLoRA, dl.DoRA])
def test_exports_are_of_the_base_in_full(config, untied, tmp_path):
    """The folders are those of the same adapter beside the plain base, bit for bit."""
    for name, kind in {"ours": "nf4", "plain": "none"}.items():
        model = adapted(load(untied, kind=kind), config)
        dl.save_merged(model, tmp_path / f"{name}-merged")
        dl.save_adapter(model, tmp_path / f"{name}-peft")
    for kind in ("merged", "peft"):
        ours, plain = (tmp_path / f"{name}-{kind}" for name in ("ours", "plain"))
        files = [file.relative_to(ours) for file in ours.glob("*.safetensors")]
        assert files
        for file in files:
            assert (ours / file).read_bytes() == (plain / file).read_bytes()
    again = dl.load_adapter(load(untied), tmp_path / "ours-peft")
    assert len(kernels(again)) == 7
