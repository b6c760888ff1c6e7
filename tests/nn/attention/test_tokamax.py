"""What tokamax is asked for; what it gives is the contract of kernels."""

from __future__ import annotations

import re
from functools import partial
from types import SimpleNamespace

import jax
import jax.numpy as jnp
import pytest
from attention_inputs import both, inputs, padded_first
from kernels_elsewhere import plain_tokamax

from droplora_jax.nn.attention import tokamax
from droplora_jax.nn.attention.kernel import AttentionInputs
from droplora_jax.nn.attention.tokamax import tokamax_attention
from droplora_jax.runs.planning.flops import matrix_flops


@pytest.fixture
def plain_kernel(monkeypatch):
    plain_tokamax(monkeypatch)


def test_operations_are_those_of_the_causal_half(plain_kernel):
    *qkv, dy = inputs(64)
    half = 2 * 2 * 4 * 8 * (64 * 65 // 2)
    given = AttentionInputs(*qkv, padded_first(64))
    assert matrix_flops(jax.make_jaxpr(tokamax_attention)(given)) == 2 * half
    run = partial(both, tokamax_attention, given)
    assert matrix_flops(jax.make_jaxpr(run)(*qkv, dy)) == 9 * half


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


@pytest.mark.parametrize(("segmented", "window"), [(False, None), (True, 40)])
def test_tokamax_takes_what_it_is_given(monkeypatch, segmented, window):
    """Traced as for a Hopper GPU, of which there is none."""
    pytest.importorskip("tokamax", tokamax.VERSION)
    from tokamax._src import gpu_utils

    monkeypatch.setattr(gpu_utils, "has_mosaic_gpu_support", lambda *_: True)
    monkeypatch.setattr(gpu_utils, "_cc_between", lambda low, high, *_: low <= 9 < high)
    *qkv, dy = inputs(256, head_dim=64, dtype=jnp.bfloat16)
    ids = padded_first(256) if segmented else None
    run = partial(both, tokamax_attention, AttentionInputs(*qkv, ids, window))
    found = jax.eval_shape(run, *qkv, dy)
    assert [(x.shape, x.dtype) for x in found] == [(x.shape, x.dtype) for x in (dy, *qkv)]
