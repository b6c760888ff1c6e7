"""The GPU kernel that skips segments: what is asked of it; what it gives is in `test_cudnn.py`."""

from __future__ import annotations

import re
from functools import partial
from types import SimpleNamespace

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from attention_inputs import both, inputs, padded_first
from oracles import relative

from droplora_jax.models.layer import REMAT_POLICIES
from droplora_jax.nn.attention import tokamax
from droplora_jax.nn.attention.dispatch import attention
from droplora_jax.nn.attention.tokamax import tokamax_attention
from droplora_jax.runs.planning.flops import matrix_flops


def from_first(q_BTNH, k_BTKH, v_BTKH, first_BT):
    """Attention to keys from the first one that a position sees, in plain products."""
    groups = q_BTNH.shape[2] // k_BTKH.shape[2]
    k, v = (jnp.repeat(x, groups, axis=2) for x in (k_BTKH, v_BTKH))
    keys, queries = np.arange(q_BTNH.shape[1]), np.arange(q_BTNH.shape[1])[:, None]
    visible_BTS = jnp.broadcast_to(keys <= queries, (len(q_BTNH), len(keys), len(keys)))
    if first_BT is not None:
        visible_BTS = visible_BTS & (keys >= first_BT[:, :, None])
    scores = jnp.einsum("BTNH,BSNH->BNTS", q_BTNH, k) * q_BTNH.shape[3] ** -0.5
    scores = jnp.where(visible_BTS[:, None], scores, -jnp.inf)
    return jnp.einsum("BNTS,BSNH->BTNH", jax.nn.softmax(scores), v), scores


@pytest.fixture
def plain_kernel(monkeypatch):
    """Computes what is asked of the kernel by XLA's plain products."""

    def tokamax_forward(q, k, v, first):
        y, scores = from_first(q, k, v, first)
        return y, (scores.max(axis=-1), jnp.exp(scores).sum(axis=-1))

    def tokamax_backward(q, k, v, first, y, softmax, dy):
        return jax.vjp(lambda *qkv: from_first(*qkv, first)[0], q, k, v)[1](dy)

    for function in (tokamax_forward, tokamax_backward):
        monkeypatch.setattr(tokamax, function.__name__, jax.jit(function))


@pytest.mark.parametrize("window", [None, 4])
@pytest.mark.parametrize("segmented", [False, True])
@pytest.mark.parametrize(("length", "kv_heads"), [(9, 2), (24, 4), (15, 1)])
def test_what_is_asked_is_the_plain_path(plain_kernel, length, kv_heads, segmented, window):
    *qkv, dy = inputs(length, kv_heads)
    ids = padded_first(length) if segmented else None
    seen = None if window is None else jnp.int32(window)
    ours = both(lambda *qkv: tokamax_attention(*qkv, ids, window), *qkv, dy)
    plain = both(lambda *qkv: attention(*qkv, ids, seen, kernel="blockwise"), *qkv, dy)
    for x, y in zip(ours, plain, strict=True):
        assert relative(x, y) < 1e-5


@pytest.mark.parametrize(("policy", "forward"), [("dots", 1), ("attention", 1), ("nothing", 2)])
def test_a_policy_that_saves_its_result_runs_the_forward_pass_once(plain_kernel, policy, forward):
    *qkv, dy = inputs(24)
    run = partial(tokamax_attention, segment_ids_BT=padded_first(24), window=None)
    program = jax.make_jaxpr(partial(both, jax.checkpoint(run, policy=REMAT_POLICIES[policy])))
    calls = re.findall(r"name=(tokamax_\w+)", str(program(*qkv, dy)))
    assert sorted(calls) == ["tokamax_backward", *["tokamax_forward"] * forward]


def test_operations_are_those_of_the_causal_half(plain_kernel):
    *qkv, dy = inputs(64)
    half = 2 * 2 * 4 * 8 * (64 * 65 // 2)
    run = partial(tokamax_attention, segment_ids_BT=padded_first(64), window=None)
    assert matrix_flops(jax.make_jaxpr(run)(*qkv)) == 2 * half
    assert matrix_flops(jax.make_jaxpr(partial(both, run))(*qkv, dy)) == 9 * half


@pytest.mark.parametrize(
    ("installed", "capability", "dtype", "head_dim", "words"),
    [
        ("0.0.17", "9.0", "bfloat16", 128, None),
        ("0.0.17", "10.0", "float16", 64, None),
        (
            None,
            "9.0",
            "bfloat16",
            128,
            r"it is not installed: pip install 'droplora-jax\[tokamax]'",
        ),
        ("0.0.12", "9.0", "bfloat16", 128, "it is of version 0.0.12: pip install"),
        ("0.0.17", "9.0", "float32", 128, "takes bfloat16 and float16, not float32"),
        ("0.0.17", "9.0", "bfloat16", 96, "heads of 64 or 128, not of 96"),
        ("0.0.17", "8.9", "bfloat16", 128, "capability 9 and 10, not of 8.9"),
        ("0.0.17", "12.0", "bfloat16", 128, "capability 9 and 10, not of 12"),
    ],
)
def test_what_it_refuses(monkeypatch, installed, capability, dtype, head_dim, words):
    monkeypatch.setattr(tokamax, "_installed", lambda: installed)
    device = SimpleNamespace(compute_capability=capability)
    reason = tokamax.refusal(device, dtype, head_dim)
    assert reason is words is None or re.search(words, reason)


@pytest.mark.parametrize("window", [None, 40])
@pytest.mark.parametrize("segmented", [False, True])
def test_tokamax_takes_what_it_is_given(monkeypatch, segmented, window):
    """Traced as for a Hopper GPU, of which there is none."""
    pytest.importorskip("tokamax", tokamax.VERSION)
    from tokamax._src import gpu_utils

    monkeypatch.setattr(gpu_utils, "has_mosaic_gpu_support", lambda *_: True)
    monkeypatch.setattr(gpu_utils, "_cc_between", lambda low, high, *_: low <= 9 < high)
    *qkv, dy = inputs(256, head_dim=64, dtype=jnp.bfloat16)
    ids = padded_first(256) if segmented else None
    run = partial(both, lambda *qkv: tokamax_attention(*qkv, ids, window))
    found = jax.eval_shape(run, *qkv, dy)
    assert [(x.shape, x.dtype) for x in found] == [(x.shape, x.dtype) for x in (dy, *qkv)]
