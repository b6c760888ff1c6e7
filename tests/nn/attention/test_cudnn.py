"""The GPU kernel: what is asked of it, and where there is an NVIDIA GPU, what it gives."""

from __future__ import annotations

import re
from functools import partial
from types import MappingProxyType, SimpleNamespace

import jax
import jax.numpy as jnp
import pytest
from attention_inputs import both, inputs, packed
from oracles import relative

from droplora_jax.core.config import MeshConfig
from droplora_jax.core.sharding import make_mesh
from droplora_jax.nn.attention import cudnn, dispatch
from droplora_jax.nn.attention.cudnn import cudnn_attention
from droplora_jax.nn.attention.dispatch import attention, saved_of_kernels
from droplora_jax.runs.planning.flops import matrix_flops


@pytest.fixture
def without_a_gpu(monkeypatch):
    """Lets the kernel be traced and lowered where no cuDNN is installed."""
    from jax._src.cudnn import fused_attention_stablehlo

    monkeypatch.setattr(fused_attention_stablehlo, "check_cudnn_version", lambda: 91500)


@pytest.fixture
def by_xla(monkeypatch):
    """Computes what is asked of the kernel by XLA's plain products."""
    plain = jax.nn.dot_product_attention

    def instead(*arguments, implementation, **options):
        assert implementation == "cudnn"
        return plain(*arguments, implementation="xla", **options)

    monkeypatch.setattr(jax.nn, "dot_product_attention", instead)


@pytest.mark.parametrize("window", [None, 4])
@pytest.mark.parametrize("segmented", [False, True])
@pytest.mark.parametrize(("length", "kv_heads"), [(9, 2), (24, 4), (15, 1)])
def test_what_is_asked_is_the_plain_path(by_xla, length, kv_heads, segmented, window):
    *qkv, dy = inputs(length, kv_heads)
    ids = packed(length) if segmented else None
    seen = None if window is None else jnp.int32(window)
    ours = both(lambda *qkv: cudnn_attention(*qkv, ids, window), *qkv, dy)
    plain = both(lambda *qkv: attention(*qkv, ids, seen, kernel="blockwise"), *qkv, dy)
    for x, y in zip(ours, plain, strict=True):
        assert relative(x, y) < 1e-5


def lowered(f, *arguments) -> str:
    text = jax.jit(f).trace(*arguments).lower(lowering_platforms=("cuda",)).as_text()
    return text.replace("\\22", '"')


@pytest.mark.parametrize(("segmented", "bias"), [(False, ""), (True, "ScaleBias")])
@pytest.mark.parametrize("window", [None, 4])
def test_the_kernel_is_what_a_gpu_is_given(without_a_gpu, segmented, bias, window):
    *qkv, dy = inputs(64, head_dim=64, dtype=jnp.bfloat16)
    ids = packed(64) if segmented else None
    text = lowered(partial(both, lambda *qkv: cudnn_attention(*qkv, ids, window)), *qkv, dy)
    calls = re.findall(r"__cudnn\$fmha(\w+)", text)
    assert calls == [f"{bias}Softmax", f"{bias}SoftmaxBackward"]
    assert set(re.findall(r"mask_type\W+(\w+)", text)) == {"CAUSAL"}
    assert set(re.findall(r"sliding_window_length\W+(\d+)", text)) == {
        "0" if segmented else str(window or 0)
    }


def test_every_device_has_its_rows_and_heads(without_a_gpu, monkeypatch):
    own = dispatch.OfPlatform("cpu", lambda *_: None, cudnn_attention)
    monkeypatch.setattr(dispatch, "KERNELS", MappingProxyType({"cudnn": own}))
    mesh = make_mesh(MeshConfig(data=1, fsdp=2, tensor=4))
    *qkv, dy = inputs(64, head_dim=64, dtype=jnp.bfloat16)
    run = partial(attention, mesh=mesh, windows=(4, 8))
    text = lowered(partial(both, lambda *qkv: run(*qkv, None, jnp.int32(8))), *qkv, dy)
    shapes = set(re.findall(r'"dimensions": \[([^]]*)\]', text))
    assert shapes == {'"1", "1", "64", "64"'}  # of the scores: one row and head of two and four
    assert set(re.findall(r'"sliding_window_length": (\d+)', text)) == {"4", "8"}


@pytest.mark.parametrize(("save", "forward"), [(saved_of_kernels, 1), (None, 2)])
def test_a_policy_that_saves_its_result_runs_the_forward_pass_once(without_a_gpu, save, forward):
    *qkv, dy = inputs(64, head_dim=64, dtype=jnp.bfloat16)
    run = jax.checkpoint(lambda *qkv: cudnn_attention(*qkv, packed(64), None), policy=save)
    text = lowered(partial(both, run), *qkv, dy)
    assert len(re.findall(r"__cudnn\$\w+Softmax\b", text)) == forward


def test_operations_are_those_of_the_causal_half(without_a_gpu):
    *qkv, dy = inputs(64, head_dim=64, dtype=jnp.bfloat16)
    half = 2 * 2 * 4 * 64 * (64 * 65 // 2)

    def count(f, *arguments):
        return matrix_flops(jax.make_jaxpr(f)(*arguments))

    run = partial(cudnn_attention, segment_ids_BT=packed(64), window=None)
    assert count(run, *qkv) == 2 * half
    assert count(partial(both, run), *qkv, dy) == 7 * half


@pytest.mark.parametrize(
    ("capability", "dtype", "head_dim", "words"),
    [
        ("9.0", "bfloat16", 256, None),
        ("8.0", "float16", 128, None),
        ("9.0", "float32", 128, "takes bfloat16 and float16, not float32"),
        ("8.0", "bfloat16", 256, "heads of up to 128 in steps of 8 on this GPU, not of 256"),
        ("9.0", "bfloat16", 100, "heads of up to 256 in steps of 8 on this GPU, not of 100"),
    ],
)
def test_what_it_refuses(capability, dtype, head_dim, words):
    reason = cudnn.refusal(SimpleNamespace(compute_capability=capability), dtype, head_dim)
    assert reason is words is None or words in reason


def nvidia() -> bool:
    device = jax.local_devices()[0]
    return device.platform == "gpu" and "rocm" not in device.client.platform_version


@pytest.mark.skipif("not nvidia()", reason="cuDNN's kernel runs on an NVIDIA GPU only")
@pytest.mark.parametrize("window", [None, 40])
@pytest.mark.parametrize("segmented", [False, True])
@pytest.mark.parametrize("length", [256, 301])
@pytest.mark.parametrize("kernel", ["cudnn", "tokamax"])
def test_on_a_gpu(kernel, length, segmented, window):
    """To bfloat16's rounding."""
    *qkv, dy = inputs(length, head_dim=64, dtype=jnp.bfloat16)
    if reason := dispatch.KERNELS[kernel].refusal(jax.devices()[0], jnp.bfloat16, 64):
        pytest.skip(reason)
    ids = packed(length) if segmented else None
    seen = None if window is None else jnp.int32(window)
    options = {"windows": (window,) if window else ()}
    with jax.default_matmul_precision("highest"):
        exact = both(
            lambda *qkv: attention(*qkv, ids, seen, kernel="blockwise"),
            *(x.astype(jnp.float32) for x in (*qkv, dy)),
        )
    ours = both(lambda *qkv: attention(*qkv, ids, seen, kernel=kernel, **options), *qkv, dy)
    for x, y in zip(ours, exact, strict=True):
        assert x.dtype == jnp.bfloat16
        assert relative(x, y) < 2e-2
