"""Which kernel is taken, and what blockwise attention reads and keeps."""

from __future__ import annotations

import re
from unittest.mock import Mock

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from attention_inputs import inputs, results
from jax.sharding import Mesh
from oracles import relative

from droplora_jax.core.errors import InputError
from droplora_jax.core.sharding import make_mesh
from droplora_jax.nn.attention import query_blocks, tokamax
from droplora_jax.nn.attention.dispatch import attention, choose
from droplora_jax.nn.attention.kernel import AttentionInputs

pytestmark = pytest.mark.usefixtures("strict")


def attend(*qkv: jax.Array) -> jax.Array:
    return attention(AttentionInputs(*qkv))


@pytest.mark.parametrize(
    ("windowed", "separate_rows"), [(False, False), (True, True)], ids=["packed", "window"]
)
def test_keys_that_a_block_can_not_see_are_not_read(monkeypatch, windowed, separate_rows):
    """Those of other documents, or outside the window: their NaN does not come in."""
    monkeypatch.setattr(query_blocks, "MIN_ROWS", 4)
    q, k, v, dy = inputs(64)
    segments = jnp.asarray(np.repeat([[1, 2], [5, 7]], 32, axis=1).astype(np.int32))
    mesh = make_mesh(devices=jax.devices()[:1]) if separate_rows else None
    unseen = (np.arange(64) < 24)[:, None, None]
    k, v = (jnp.asarray(np.where(unseen, np.nan, x), jnp.float32) for x in (k, v))
    seen = (None, jnp.int32(9)) if windowed else (segments, None)

    @jax.jit
    def run(*qkv):
        y, pullback = jax.vjp(
            lambda *qkv: attention(AttentionInputs(*qkv, *seen), mesh=mesh)[:, 32:], *qkv
        )
        return y, *(gradient[:, 32:] for gradient in pullback(dy[:, 32:]))

    assert all(np.isfinite(x).all() for x in run(q, k, v))


def test_a_single_position_passes_its_value_through():
    *qkv, dy = inputs(1)
    y, dq, dk, dv = map(np.asarray, results(attention, AttentionInputs(*qkv), dy))
    np.testing.assert_array_equal(y, np.repeat(qkv[2], 2, axis=2))
    assert np.abs(dq).max() < 1e-5
    assert np.abs(dk).max() < 1e-5
    assert relative(dv, np.asarray(dy).reshape(2, 1, 2, 2, 8).sum(3)) < 1e-6


def test_large_scores_stay_finite():
    *qkv, dy = (jnp.asarray(np.asarray(x) * 100) for x in inputs(9))
    found = results(attention, AttentionInputs(*qkv), dy)
    assert all(np.isfinite(x).all() for x in found)


def test_no_scores_are_kept_for_the_backward_pass():
    q, k, v, _ = inputs(64)
    saved = jax.tree.leaves(jax.eval_shape(lambda *qkv: jax.vjp(attend, *qkv)[1], q, k, v))
    assert saved
    assert all(x.size <= q.size for x in saved)


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
    ("name", "platform", "dtype", "context", "kernel", "why"),
    [
        ("auto", "tpu", "bfloat16", 1, "splash", "auto: made for tpu"),
        ("auto", "cuda", "bfloat16", 1, "cudnn", "auto: made for cuda"),
        (
            "auto",
            "cuda",
            "float32",
            1,
            "blockwise",
            "auto: not cudnn, as it takes bfloat16 and float16, not float32",
        ),
        (
            "auto",
            "cuda",
            "bfloat16",
            4,
            "blockwise",
            "auto: not cudnn, as it takes whole",
        ),
        ("auto", "rocm", "bfloat16", 1, "blockwise", "auto: no other is made for rocm"),
        ("auto", "cpu", "float32", 1, "blockwise", "auto: no other is made for cpu"),
        ("auto", "tpu", "bfloat16", 4, "blockwise", "auto: not splash.*over context=4"),
        ("blockwise", "tpu", "bfloat16", 1, "blockwise", "asked for"),
        ("splash", "tpu", "float32", 1, "splash", "asked for"),
    ],
)
def test_the_choice_and_why(name, platform, dtype, context, kernel, why):
    found = choose(name, mesh=fake_mesh(platform, context), dtype=dtype, head_dim=128)
    assert found.kernel == kernel
    assert re.fullmatch(rf"{kernel} \({why}.*\)", str(found))


@pytest.mark.parametrize(
    ("name", "platform", "dtype", "context", "reason"),
    [
        ("splash", "cpu", "float32", 1, "it is made for tpu, and the devices are cpu"),
        ("splash", "cuda", "bfloat16", 1, "it is made for tpu, and the devices are cuda"),
        ("cudnn", "rocm", "bfloat16", 1, "it is made for cuda, and the devices are rocm"),
        ("cudnn", "cuda", "float32", 1, "it takes bfloat16 and float16, not float32"),
        ("splash", "tpu", "bfloat16", 2, "positions are split over context=2 devices"),
    ],
)
def test_a_kernel_that_can_not_run_is_an_error(name, platform, dtype, context, reason):
    words = rf"attention='{name}': .*{reason}; use auto, or blockwise"
    with pytest.raises(InputError, match=words):
        choose(name, mesh=fake_mesh(platform, context), dtype=dtype, head_dim=128)


def test_tokamax_is_taken_by_its_name_only(monkeypatch):
    monkeypatch.setattr(tokamax, "_installed", lambda: tokamax.VERSION)
    on_gpu = {"mesh": fake_mesh("cuda"), "dtype": "bfloat16", "head_dim": 128}
    assert choose("auto", **on_gpu).kernel == "cudnn"
    assert choose("tokamax", **on_gpu).kernel == "tokamax"


def test_without_a_mesh_the_devices_are_those_here():
    assert choose("auto", mesh=None, dtype="float32", head_dim=8).kernel == "blockwise"
    with pytest.raises(InputError, match="the devices are cpu"):
        attention(AttentionInputs(*inputs(9)[:3]), kernel="splash")
