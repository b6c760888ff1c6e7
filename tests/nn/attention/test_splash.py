"""The TPU kernel, interpreted: blocks, windows and meshes; the rest is the contract of kernels."""

from __future__ import annotations

import re
from functools import partial
from types import MappingProxyType

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from attention_inputs import inputs, of_pytorch, results
from flax import nnx
from oracles import relative

from droplora_jax.core.config import MeshConfig
from droplora_jax.core.sharding import make_mesh
from droplora_jax.models.config import SEES_ALL, ModelConfig
from droplora_jax.models.decoder import Decoder
from droplora_jax.nn.attention import dispatch, splash
from droplora_jax.nn.attention.dispatch import attention
from droplora_jax.nn.attention.kernel import AttentionInputs, PlatformKernel
from droplora_jax.nn.attention.splash import BLOCK, LANES, block_size, splash_attention
from droplora_jax.nn.options import StepOptions
from droplora_jax.nn.rope import RopeConfig
from droplora_jax.runs.planning.flops import matrix_flops

interpreted = partial(splash_attention, interpret=True)


@pytest.fixture
def here(monkeypatch):
    """Lets the dispatch take the kernel on a CPU."""
    kernel = PlatformKernel("cpu", splash.refusal, interpreted)
    monkeypatch.setattr(dispatch, "KERNELS", MappingProxyType({"splash": kernel}))


def packed(length: int, rows: int = 2) -> jax.Array:
    """Three documents a row, and padding behind them."""
    ends = np.sort(np.random.default_rng(1).integers(1, length, (rows, 3)))
    ids = (np.arange(length)[None, :, None] >= ends[:, None]).sum(-1) + 1
    return jnp.asarray(np.where(ids == 4, 0, ids), jnp.int32)


def assert_equal(one, other, tolerance=1e-5):
    for x, y in zip(one, other, strict=True):
        assert relative(x, y) < tolerance


@pytest.mark.parametrize(("kv_heads", "window"), [(1, None), (2, 150)])
def test_several_blocks(kv_heads, window):
    *qkv, dy = inputs(700, kv_heads)
    given = AttentionInputs(*qkv, packed(700), window)
    assert_equal(results(interpreted, given, dy), of_pytorch(given, dy))


def test_the_gradients_in_two_passes_are_those_in_one(monkeypatch):
    *qkv, dy = inputs(300)
    given = AttentionInputs(*qkv, packed(300))
    monkeypatch.setattr(splash, "MAX_FUSED_BLOCKS", 0)
    assert_equal(results(interpreted, given, dy), of_pytorch(given, dy))


@pytest.mark.parametrize("length", [1, 128, 129, 512, 513, 640, 2176, 131072])
def test_blocks_are_even_and_fill_up_little(length):
    block = block_size(length)
    assert block % LANES == 0
    assert LANES <= block <= BLOCK
    blocks = -(-length // block)
    assert blocks * block - length < LANES * blocks
    assert blocks <= -(-length // BLOCK)


@pytest.mark.parametrize(
    ("sizes", "rows"),
    [({"fsdp": 2, "tensor": 4}, 2), ({"fsdp": 8}, 2)],
    ids=["fewer keys' heads than devices", "fewer rows than devices"],
)
def test_on_a_mesh(here, sizes, rows):
    mesh = make_mesh(MeshConfig(data=1, **sizes))
    *qkv, dy = inputs(100, rows=rows)
    given = AttentionInputs(*qkv, packed(100, rows), 7)
    run = partial(attention, mesh=mesh, kernel="splash", windows=(7,))
    ours = results(lambda given: run(given._replace(window=jnp.int32(7))), given, dy)
    assert_equal(ours, of_pytorch(given, dy))


def test_windows_that_differ_from_layer_to_layer(here):
    """Under remat, in one scan."""
    *qkv, dy = inputs(60)
    windows = (5, 30, SEES_ALL)

    def layers(kernel, given):
        def layer(q, window):
            inputs = given._replace(q_BTNH=q, window=window)
            return attention(inputs, windows=windows, kernel=kernel), None

        save = jax.checkpoint_policies.save_only_these_names("attention")
        layer = jax.checkpoint(layer, policy=save, prevent_cse=False)
        each = jnp.asarray([30, SEES_ALL, 5, 5], jnp.int32)
        return jax.lax.scan(layer, given.q_BTNH, each)[0]

    given = AttentionInputs(*qkv, packed(60))
    ours, plain = (results(partial(layers, name), given, dy) for name in ("splash", "blockwise"))
    assert_equal(ours, plain)


def test_a_kernel_needs_to_know_the_windows(here):
    q, k, v, _ = inputs(9)
    with pytest.raises(ValueError, match="pass all `windows`"):
        attention(AttentionInputs(q, k, v, None, jnp.int32(5)))


@pytest.mark.parametrize(("policy", "forward"), [("attention", 1), ("dots", 2)])
def test_a_policy_that_saves_the_name_runs_the_forward_pass_once(policy, forward):
    """In what is handed to the compiler for TPUs."""
    save = jax.checkpoint_policies.save_only_these_names(policy)
    run = jax.checkpoint(lambda *qkv: splash_attention(AttentionInputs(*qkv)), policy=save)

    def both(q, k, v, dy):
        y, pullback = jax.vjp(run, q, k, v)
        return y, pullback(dy)

    text = jax.jit(both).trace(*inputs(64)).lower(lowering_platforms=("tpu",)).as_text()
    kernels = re.findall(r'kernel_name = "splash_mha_(fwd|dkv|dq)', text)
    assert kernels == ["fwd"] * forward + ["dkv"]


@pytest.mark.parametrize(("blocks", "backward"), [(1, 5), (4, 5), (5, 7)])
def test_operations_are_those_of_the_blocks_that_are_not_skipped(blocks, backward):
    """Of two products forwards, and five backwards, or seven in two passes."""
    rows, heads, length = 3, 4, blocks * BLOCK
    q, k, v, _ = (
        jax.ShapeDtypeStruct(x.shape, x.dtype) for x in inputs(length, 2, LANES, rows=rows)
    )
    product = 2 * rows * heads * length**2 * LANES * (blocks + 1) // (2 * blocks)
    means = 2 * rows * heads * length * LANES  # of a result's gradient, by the result

    def count(f):
        return matrix_flops(jax.make_jaxpr(f)(q, k, v))

    def loss(*qkv):
        return interpreted(AttentionInputs(*qkv)).sum()

    assert count(loss) == 2 * product
    assert count(jax.grad(loss, argnums=(0, 1, 2))) == (2 + backward) * product + means


def test_a_window_takes_fewer_operations():
    q, k, v, _ = (
        jax.ShapeDtypeStruct(x.shape, x.dtype) for x in inputs(8 * BLOCK, 2, LANES, rows=1)
    )
    of = {
        window: matrix_flops(
            jax.make_jaxpr(lambda *qkv, w=window: interpreted(AttentionInputs(*qkv, None, w)))(
                q, k, v
            )
        )
        for window in (None, BLOCK + 1)
    }
    # Two blocks for every block of queries, or one for each of the eight before it and its own.
    assert of[BLOCK + 1] == of[None] * (8 * 2) / (8 * 9 / 2)


def test_a_decoder(here):
    """Windows of some layers, grouped heads, remat, and the prompt of a cache."""
    config = ModelConfig(
        family="llama",
        vocab_size=32,
        width=16,
        layers=2,
        heads=4,
        kv_heads=2,
        head_dim=8,
        ffn=16,
        norm_epsilon=1e-5,
        rope=RopeConfig(theta=1e4),
        tie_embeddings=True,
        max_positions=64,
        windows=(None, 3),
    )
    tokens = jnp.asarray(np.random.default_rng(0).integers(0, 32, (2, 12)), jnp.int32)
    ids = packed(12)

    def found(kernel):
        model, options = Decoder(config, rngs=nnx.Rngs(0)), StepOptions(True, "dots", kernel)
        assert model.attention_kernel(options).kernel == kernel

        def loss(model):
            return jnp.square(model(tokens, segment_ids=ids, options=options)).mean()

        @nnx.jit
        def run(model):
            value, gradients = nnx.value_and_grad(loss)(model)
            caches = model.empty_caches(2, 16)
            prompt, _ = model.extend(caches, tokens, jnp.ones_like(tokens), options)
            return value, prompt, *jax.tree.leaves(gradients)

        return run(model)

    assert_equal(found("splash"), found("blockwise"))
