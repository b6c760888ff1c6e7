from __future__ import annotations

import re
from unittest.mock import Mock

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import torch
from jax.sharding import Mesh
from oracles import relative

from droplora_jax.core.config import MeshConfig
from droplora_jax.core.errors import InputError
from droplora_jax.core.sharding import make_mesh
from droplora_jax.nn.attention import query_blocks, tokamax
from droplora_jax.nn.attention.context_parallel import deals
from droplora_jax.nn.attention.dispatch import attention, choose

pytestmark = pytest.mark.usefixtures("strict")

SEGMENTS = np.asarray([[1, 1, 1, 2, 2, 2, 2, 2, 2], [3, 3, 1, 1, 1, 0, 0, 0, 0]], np.int32)


def normal(*shape: int, seed: int = 0) -> np.ndarray:
    return np.random.default_rng(seed).normal(size=shape).astype(np.float32)


def inputs(kv_heads: int, length: int = 9, width: int = 8) -> list[np.ndarray]:
    """q, k, v, and a gradient of the result."""
    heads = (4, kv_heads, kv_heads, 4)
    return [normal(2, length, n, width, seed=i) for i, n in enumerate(heads)]


@pytest.mark.parametrize("length", [2, 9])
@pytest.mark.parametrize("kv_heads", [4, 2, 1])
@pytest.mark.parametrize("packed", [False, True])
def test_values_and_gradients_equal_pytorch(kv_heads, packed, length):
    *qkv, dy = inputs(kv_heads, length)
    segments = SEGMENTS[:, :length]
    allowed = np.tril(np.ones((length, length), bool))[None, None]
    if packed:
        allowed = allowed & (segments[:, None, :, None] == segments[:, None, None, :])
    theirs = [torch.tensor(x, requires_grad=True) for x in qkv]
    expected = torch.nn.functional.scaled_dot_product_attention(
        *(x.transpose(1, 2) for x in theirs),
        attn_mask=torch.tensor(np.broadcast_to(allowed, (2, 1, length, length)).copy()),
        enable_gqa=True,
    ).transpose(1, 2)
    expected.backward(torch.tensor(dy))

    ours, pullback = jax.vjp(
        lambda *qkv: attention(*qkv, jnp.asarray(segments) if packed else None),
        *map(jnp.asarray, qkv),
    )
    assert relative(ours, expected.detach()) < 1e-5
    for gradient, x in zip(pullback(jnp.asarray(dy)), theirs, strict=True):
        assert relative(gradient, x.grad) < 1e-5


@pytest.mark.parametrize("length", [9, 64])
@pytest.mark.parametrize("windowed", [False, True])
@pytest.mark.parametrize("packed", [False, True])
@pytest.mark.parametrize("apart", [False, True])
def test_portions_and_spans_change_nothing(monkeypatch, length, windowed, packed, apart):
    """Long rows take their queries in portions, each with some of the keys, together or apart."""
    *qkv, dy = map(jnp.asarray, inputs(2, length))
    segments = jnp.asarray(np.sort(np.random.default_rng(0).integers(0, 3, (2, length))))
    window = jnp.int32(5) if windowed else None
    mesh = make_mesh(devices=jax.devices()[:1]) if apart else None

    def both():
        def run(*qkv):
            return attention(*qkv, segments if packed else None, window, mesh=mesh)

        y, pullback = jax.vjp(run, *qkv)
        return y, *pullback(dy)

    at_once = both()
    monkeypatch.setattr(query_blocks, "SCORES", 1)
    monkeypatch.setattr(query_blocks, "ROWS", 4)  # two rows of two heads a portion
    for one, other in zip(both(), at_once, strict=True):
        assert relative(one, other) < 1e-6


@pytest.mark.parametrize("windowed", [False, True])
@pytest.mark.parametrize("apart", [False, True])
def test_keys_that_a_portion_can_not_see_are_not_read(monkeypatch, windowed, apart):
    """Of a document's, or within a window: what is not a number elsewhere does not come in."""
    monkeypatch.setattr(query_blocks, "ROWS", 4)
    q, k, v, dy = map(jnp.asarray, inputs(2, 64))
    segments = jnp.asarray(np.repeat([[1, 2], [5, 7]], 32, axis=1).astype(np.int32))
    window = jnp.int32(9) if windowed else None
    mesh = make_mesh(devices=jax.devices()[:1]) if apart else None
    k, v = (x.at[:, :24].set(jnp.nan) for x in (k, v))

    def run(*qkv):
        return attention(*qkv, None if windowed else segments, window, mesh=mesh)[:, 32:]

    y, pullback = jax.vjp(run, q, k, v)
    assert jnp.isfinite(y).all()
    dq, dk, dv = pullback(dy[:, 32:])
    assert jnp.isfinite(dq[:, 32:]).all()
    assert jnp.isfinite(dk[:, 32:]).all()
    assert jnp.isfinite(dv[:, 32:]).all()


@pytest.mark.parametrize("parts", [2, 4, 8])
@pytest.mark.parametrize("windowed", [False, True])
def test_positions_that_are_split_attend_as_whole_rows(parts, windowed):
    *qkv, dy = map(jnp.asarray, inputs(2, 64))
    segments = jnp.asarray(np.sort(np.random.default_rng(0).integers(0, 3, (2, 64))))
    window = jnp.int32(11) if windowed else None
    mesh = make_mesh(MeshConfig(fsdp=1, tensor=8 // parts, context=parts))
    assert deals(mesh, 64)

    def both(mesh):
        @jax.jit
        def run(*qkv):
            y, pullback = jax.vjp(lambda *x: attention(*x, segments, window, mesh=mesh), *qkv)
            return y, *pullback(dy)

        return run(*qkv)

    for one, other in zip(both(mesh), both(None), strict=True):
        assert relative(one, other) < 1e-6


def test_a_single_position_passes_its_value_through():
    q, k, v, dy = map(jnp.asarray, inputs(2, 1))
    y, pullback = jax.vjp(attention, q, k, v)
    np.testing.assert_array_equal(y, jnp.repeat(v, 2, axis=2))
    dq, dk, dv = pullback(dy)
    assert jnp.abs(dq).max() < 1e-5
    assert jnp.abs(dk).max() < 1e-5
    assert relative(dv, dy.reshape(2, 1, 2, 2, 8).sum(3)) < 1e-6


def test_bfloat16_is_close_and_stays_bfloat16():
    *qkv, dy = map(jnp.asarray, inputs(2))
    exact, exact_pullback = jax.vjp(attention, *qkv)
    ours, pullback = jax.vjp(attention, *(x.astype(jnp.bfloat16) for x in qkv))
    assert ours.dtype == jnp.bfloat16
    assert relative(ours, exact) < 1e-2
    gradients = pullback(dy.astype(jnp.bfloat16))
    for ours, exact in zip(gradients, exact_pullback(dy), strict=True):
        assert ours.dtype == jnp.bfloat16
        assert relative(ours, exact) < 2e-2


def test_large_scores_stay_finite():
    q, k, v, dy = (jnp.asarray(x) * 100 for x in inputs(2))
    y, pullback = jax.vjp(attention, q, k, v)
    assert all(jnp.isfinite(x).all() for x in (y, *pullback(dy)))


def test_no_scores_are_kept_for_the_backward_pass():
    length = 64
    q, k, v, _ = map(jnp.asarray, inputs(2, length))
    saved = jax.tree.leaves(jax.eval_shape(lambda *qkv: jax.vjp(attention, *qkv)[1], q, k, v))
    assert saved
    assert all(x.size <= q.size for x in saved)


@pytest.mark.parametrize(("policy", "products"), [("attention", 5), ("dots", 7)])
def test_a_policy_that_saves_the_name_runs_the_forward_pass_once(monkeypatch, policy, products):
    """For each of 8 spans: 2 products forwards, 5 backwards, and 2 more if it is run again."""
    monkeypatch.setattr(query_blocks, "ROWS", 4)
    save = jax.checkpoint_policies.save_only_these_names(policy)
    q, k, v, dy = map(jnp.asarray, inputs(2, 64))
    _, pullback = jax.vjp(jax.checkpoint(attention, policy=save), q, k, v)
    jaxpr = str(jax.make_jaxpr(pullback)(dy))
    assert jaxpr.count("dot_general[") == 8 * products


# Which kernel.


def fake_mesh(platform: str, context: int = 1) -> Mesh:
    """Of devices that are not here, as far as a choice looks at them."""
    device = Mock(
        platform="gpu" if platform in ("cuda", "rocm") else platform,
        compute_capability="9.0",
        client=Mock(platform_version=f"PJRT C API\n{platform} 13000"),
    )
    return Mock(spec=Mesh, devices=np.asarray([device]), shape={"context": context})


@pytest.mark.parametrize(
    ("asked", "platform", "dtype", "context", "kernel", "why"),
    [
        ("auto", "tpu", "bfloat16", 1, "splash", "auto: made for tpu"),
        ("auto", "cuda", "bfloat16", 1, "cudnn", "auto: made for cuda"),
        (
            "auto",
            "cuda",
            "float32",
            1,
            "blockwise",
            "auto: not tokamax, not cudnn, as it takes bfloat16 and float16, not float32",
        ),
        (
            "auto",
            "cuda",
            "bfloat16",
            4,
            "blockwise",
            "auto: not tokamax, not cudnn, as it takes whole",
        ),
        ("auto", "rocm", "bfloat16", 1, "blockwise", "auto: no other is made for rocm"),
        ("auto", "cpu", "float32", 1, "blockwise", "auto: no other is made for cpu"),
        ("auto", "tpu", "bfloat16", 4, "blockwise", "auto: not splash.*over mesh.context=4"),
        ("blockwise", "tpu", "bfloat16", 1, "blockwise", "asked for"),
        ("splash", "tpu", "float32", 1, "splash", "asked for"),
    ],
)
def test_the_choice_and_why(monkeypatch, asked, platform, dtype, context, kernel, why):
    monkeypatch.setattr(tokamax, "_installed", lambda: None)
    found = choose(asked, mesh=fake_mesh(platform, context), dtype=dtype, head_dim=128)
    assert found.kernel == kernel
    assert re.fullmatch(rf"{kernel} \({why}.*\)", str(found))


@pytest.mark.parametrize(
    ("asked", "platform", "dtype", "context", "reason"),
    [
        ("splash", "cpu", "float32", 1, "it is made for tpu, and the devices are cpu"),
        ("splash", "cuda", "bfloat16", 1, "it is made for tpu, and the devices are cuda"),
        ("cudnn", "rocm", "bfloat16", 1, "it is made for cuda, and the devices are rocm"),
        ("cudnn", "cuda", "float32", 1, "it takes bfloat16 and float16, not float32"),
        ("splash", "tpu", "bfloat16", 2, "positions are split over mesh.context=2"),
    ],
)
def test_what_is_asked_for_is_had_or_an_error(asked, platform, dtype, context, reason):
    words = rf"model.attention='{asked}': .*{reason}; use auto, or blockwise"
    with pytest.raises(InputError, match=words):
        choose(asked, mesh=fake_mesh(platform, context), dtype=dtype, head_dim=128)


@pytest.mark.parametrize(
    ("packed", "installed", "kernel"),
    [(True, True, "tokamax"), (True, False, "cudnn"), (False, True, "cudnn")],
)
def test_what_skips_other_segments_is_taken_where_there_are_some(
    monkeypatch, packed, installed, kernel
):
    there = tokamax.VERSION if installed else None
    monkeypatch.setattr(tokamax, "_installed", lambda: there)
    of = {"mesh": fake_mesh("cuda"), "dtype": "bfloat16", "head_dim": 128}
    assert choose("auto", **of, packed=packed).kernel == kernel
    assert choose("cudnn", **of, packed=packed).kernel == "cudnn"
    if installed:
        assert choose("tokamax", **of, packed=packed).kernel == "tokamax"


def test_without_a_mesh_the_devices_are_those_here():
    assert choose("auto", mesh=None, dtype="float32", head_dim=8).kernel == "blockwise"
    with pytest.raises(InputError, match="the devices are cpu"):
        attention(*map(jnp.asarray, inputs(2)[:3]), kernel="splash")
