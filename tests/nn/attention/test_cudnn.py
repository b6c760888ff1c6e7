"""What cuDNN is asked for; what it gives is the contract of kernels."""

from __future__ import annotations

import re
from functools import partial
from types import MappingProxyType, SimpleNamespace

import jax
import jax.numpy as jnp
import pytest
from attention_inputs import both, inputs, packed
from kernels_elsewhere import traced_cudnn

from droplora_jax.core.config import MeshConfig
from droplora_jax.core.sharding import make_mesh
from droplora_jax.nn.attention import cudnn, dispatch
from droplora_jax.nn.attention.dispatch import attention
from droplora_jax.nn.attention.kernel import AttentionInputs, PlatformKernel
from droplora_jax.runs.planning.flops import matrix_flops


@pytest.fixture
def cudnn_attention(monkeypatch):
    return traced_cudnn(monkeypatch)


def lowered(f, *arguments) -> str:
    text = jax.jit(f).trace(*arguments).lower(lowering_platforms=("cuda",)).as_text()
    return text.replace("\\22", '"')


@pytest.mark.parametrize(("segmented", "bias"), [(False, ""), (True, "ScaleBias")])
@pytest.mark.parametrize("window", [None, 4])
def test_the_kernel_is_what_a_gpu_is_given(cudnn_attention, segmented, bias, window):
    *qkv, dy = inputs(64, head_dim=64, dtype=jnp.bfloat16)
    ids = packed(64) if segmented else None
    given = AttentionInputs(*qkv, ids, window)
    text = lowered(partial(both, cudnn_attention, given), *qkv, dy)
    calls = re.findall(r"__cudnn\$fmha(\w+)", text)
    assert calls == [f"{bias}Softmax", f"{bias}SoftmaxBackward"]
    assert set(re.findall(r"mask_type\W+(\w+)", text)) == {"CAUSAL"}
    assert set(re.findall(r"sliding_window_length\W+(\d+)", text)) == {
        "0" if segmented else str(window or 0)
    }


def test_every_device_has_its_rows_and_heads(cudnn_attention, monkeypatch):
    kernel = PlatformKernel("cpu", lambda *_: None, cudnn_attention)
    monkeypatch.setattr(dispatch, "KERNELS", MappingProxyType({"cudnn": kernel}))
    mesh = make_mesh(MeshConfig(data=1, fsdp=2, tensor=4))
    *qkv, dy = inputs(64, head_dim=64, dtype=jnp.bfloat16)
    run = partial(attention, mesh=mesh, windows=(4, 8))
    given = AttentionInputs(*qkv, None, jnp.int32(8))
    text = lowered(partial(both, run, given), *qkv, dy)
    shapes = set(re.findall(r'"dimensions": \[([^]]*)\]', text))
    assert shapes == {'"1", "1", "64", "64"'}  # of the scores: one row and head of two and four
    assert set(re.findall(r'"sliding_window_length": (\d+)', text)) == {"4", "8"}


def test_operations_are_those_of_the_causal_half(cudnn_attention):
    *qkv, dy = inputs(64, head_dim=64, dtype=jnp.bfloat16)
    half = 2 * 2 * 4 * 64 * (64 * 65 // 2)

    def count(f, *arguments):
        return matrix_flops(jax.make_jaxpr(f)(*arguments))

    given = AttentionInputs(*qkv, packed(64))
    assert count(cudnn_attention, given) == 2 * half
    assert count(partial(both, cudnn_attention, given), *qkv, dy) == 7 * half


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
