"""What every attention kernel is held to (`kernel.PlatformKernel`); PyTorch is the oracle.

The kernels of GPUs and TPUs run here as far as a CPU can: splash is interpreted, and what is asked
of cuDNN and tokamax is computed by plain products. What they give on a GPU is the last test.
"""

from __future__ import annotations

from collections.abc import Callable
from functools import partial

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from attention_inputs import both, inputs, of_pytorch, packed, padded_first, results
from kernels_elsewhere import plain_cudnn, plain_tokamax, traced_cudnn
from oracles import relative

from droplora_jax.core.config import MeshConfig
from droplora_jax.core.sharding import make_mesh
from droplora_jax.models.layer import REMAT_POLICIES
from droplora_jax.nn.attention import dispatch, query_blocks
from droplora_jax.nn.attention.cudnn import cudnn_attention
from droplora_jax.nn.attention.dispatch import attention
from droplora_jax.nn.attention.kernel import AttentionInputs
from droplora_jax.nn.attention.splash import splash_attention
from droplora_jax.nn.attention.tokamax import tokamax_attention
from droplora_jax.runs.planning.flops import matrix_flops

Attend = Callable[[AttentionInputs], jax.Array]


def by_dispatch(given: AttentionInputs, **options) -> jax.Array:
    window = None if given.window is None else jnp.int32(given.window)
    return attention(given._replace(window=window), **options)


def small_blocks(monkeypatch) -> None:
    monkeypatch.setattr(query_blocks, "MAX_SCORES", 1)
    monkeypatch.setattr(query_blocks, "MIN_ROWS", 4)  # two queries of two heads a block


def blockwise(monkeypatch) -> Attend:
    return partial(by_dispatch, kernel="blockwise")


def in_blocks(monkeypatch) -> Attend:
    small_blocks(monkeypatch)
    return partial(by_dispatch, kernel="blockwise")


def row_by_row(monkeypatch) -> Attend:
    small_blocks(monkeypatch)
    return partial(by_dispatch, mesh=make_mesh(devices=jax.devices()[:1]))


def context_parallel(monkeypatch) -> Attend:
    return partial(by_dispatch, mesh=make_mesh(MeshConfig(fsdp=1, tensor=4, context=2)))


def splash(monkeypatch) -> Attend:
    return partial(splash_attention, interpret=True)


def cudnn(monkeypatch) -> Attend:
    plain_cudnn(monkeypatch)
    return cudnn_attention


def tokamax(monkeypatch) -> Attend:
    plain_tokamax(monkeypatch)
    return tokamax_attention


OURS = [blockwise, in_blocks, row_by_row, context_parallel]
KERNELS = [*OURS, splash, cudnn, tokamax]

# Length, key heads, segments, window.
CASES = {
    "whole rows": (64, 4, None, None),
    "odd length, window": (9, 1, None, 5),
    "packed": (24, 1, packed, None),
    "packed, window": (64, 2, packed, 4),
    "odd length, padding first": (15, 4, padded_first, None),
}


@pytest.fixture
def attend(make, monkeypatch, request) -> Attend:
    if make in OURS:
        request.getfixturevalue("strict")
    return make(monkeypatch)


@pytest.mark.parametrize("make", KERNELS)
@pytest.mark.parametrize("case", CASES.values(), ids=CASES.keys())
def test_values_and_gradients_equal_pytorch(attend, case):
    length, kv_heads, segments, window = case
    *qkv, dy = inputs(length, kv_heads)
    given = AttentionInputs(*qkv, segments and segments(length), window)
    for ours, theirs in zip(results(attend, given, dy), of_pytorch(given, dy), strict=True):
        assert relative(ours, theirs) < 1e-5


# XLA's compiler for CPUs aborts on bfloat16 sums over one axis of a mesh with several.
@pytest.mark.parametrize("make", [kernel for kernel in KERNELS if kernel is not context_parallel])
def test_bfloat16_is_close_and_stays_bfloat16(attend):
    *qkv, dy = inputs(24)
    expected = of_pytorch(AttentionInputs(*qkv, packed(24)), dy)
    *qkv, dy = inputs(24, dtype=jnp.bfloat16)
    found = results(attend, AttentionInputs(*qkv, packed(24)), dy)
    assert {x.dtype for x in found} == {jnp.dtype(jnp.bfloat16)}
    for ours, exact in zip(found, expected, strict=True):
        assert relative(ours, exact) < 2e-2


@pytest.mark.parametrize("make", [in_blocks, traced_cudnn, tokamax])
@pytest.mark.parametrize("policy", ["dots", "attention", "nothing"])
def test_a_policy_that_saves_attention_runs_the_forward_pass_once(attend, policy):
    *qkv, dy = inputs(64, head_dim=64, dtype=jnp.bfloat16)
    given = AttentionInputs(*qkv, packed(64))

    def flops(f, *arguments) -> int:
        return matrix_flops(jax.make_jaxpr(f)(*arguments))

    def differentiated(f) -> int:
        return flops(partial(both, f, given), *qkv, dy)

    forward = flops(lambda *qkv: attend(AttentionInputs(*qkv, *given[3:])), *qkv)
    remat = differentiated(jax.checkpoint(attend, policy=REMAT_POLICIES[policy]))
    again = forward if policy == "nothing" else 0
    assert remat == differentiated(attend) + again


def nvidia() -> bool:
    device = jax.local_devices()[0]
    return device.platform == "gpu" and "rocm" not in device.client.platform_version


@pytest.mark.skipif("not nvidia()", reason="the kernels run on an NVIDIA GPU only")
@pytest.mark.parametrize(
    ("length", "segments", "window"),
    [(256, None, None), (301, packed, None), (256, packed, 40), (301, None, 40)],
    ids=["even", "odd, packed", "even, packed, window", "odd, window"],
)
@pytest.mark.parametrize("kernel", ["cudnn", "tokamax"])
def test_on_a_gpu(kernel, length, segments, window):
    """To bfloat16's rounding."""
    *qkv, dy = inputs(length, head_dim=64, dtype=jnp.bfloat16)
    if reason := dispatch.KERNELS[kernel].refusal(jax.devices()[0], jnp.bfloat16, 64):
        pytest.skip(reason)
    given = AttentionInputs(*qkv, segments and segments(length), window)
    exact = of_pytorch(given._replace(**{n: _f64(x) for n, x in given._asdict().items()}), _f64(dy))
    attend = partial(by_dispatch, kernel=kernel, windows=(window,) if window else ())
    for ours, theirs in zip(results(attend, given, dy), exact, strict=True):
        assert ours.dtype == jnp.bfloat16
        assert relative(ours, theirs) < 2e-2


def _f64(x):
    floating = isinstance(x, jax.Array) and jnp.issubdtype(x.dtype, jnp.floating)
    return np.asarray(x.astype(jnp.float32), np.float64) if floating else x
