"""Causal attention: one function that chooses a kernel and runs it on the mesh.

Letters: `B` batch, `T` position, `S` slot of a cache, `N` query heads, `K` key/value heads,
`H` head width.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from types import MappingProxyType
from typing import get_args

import jax
import jax.numpy as jnp
from jax.sharding import Mesh, PartitionSpec
from jax.typing import DTypeLike
from jaxtyping import Array, Float, Int

from droplora_jax.core.errors import InputError
from droplora_jax.core.sharding import divides, partition_spec
from droplora_jax.nn.attention import cudnn, splash, tokamax
from droplora_jax.nn.attention.blockwise import attend
from droplora_jax.nn.attention.context_parallel import attention_on_mesh
from droplora_jax.nn.attention.kernel import AttentionInputs, Device, PlatformKernel
from droplora_jax.nn.options import Kernel

Run = Callable[[AttentionInputs], Float[Array, "B T N H"]]

# `auto` takes the first kernel listed for the platform that accepts the dtype and head width.
KERNELS: Mapping[Kernel, PlatformKernel] = MappingProxyType(
    {
        "splash": PlatformKernel("tpu", splash.refusal, splash.splash_attention),
        "cudnn": PlatformKernel("cuda", cudnn.refusal, cudnn.cudnn_attention),
        "tokamax": PlatformKernel(
            "cuda", tokamax.refusal, tokamax.tokamax_attention, automatic=False
        ),
    }
)

# A remat policy for the kernel that does not name its residuals "attention" itself.
saves_kernel = cudnn.is_forward


@dataclass(frozen=True)
class Choice:
    """The kernel that is taken, and why."""

    kernel: Kernel
    why: str

    def __str__(self) -> str:
        return f"{self.kernel} ({self.why})"


def choose(kernel: Kernel, *, mesh: Mesh | None, dtype: DTypeLike, head_dim: int) -> Choice:
    """The kernel for activations of a dtype and heads of a width on the devices of a mesh.

    See `PlatformKernel` for what `auto` takes.

    Raises:
      InputError: the devices can't run the kernel that is named.
    """
    if kernel not in (known := get_args(Kernel)):
        raise InputError(f"attention={kernel!r}: must be one of {', '.join(known)}")
    if kernel == "blockwise":
        return Choice(kernel, "asked for")
    device = jax.local_devices()[0] if mesh is None else mesh.devices.flat[0]
    context = 1 if mesh is None else mesh.shape["context"]
    if kernel != "auto":
        if (reason := _refusal(KERNELS[kernel], device, context, dtype, head_dim)) is not None:
            raise InputError(f"attention={kernel!r}: {reason}; use auto, or blockwise")
        return Choice(kernel, "asked for")
    platform, refusals = _platform(device), []
    for name, candidate in KERNELS.items():
        if candidate.automatic and candidate.platform == platform:
            reason = _refusal(candidate, device, context, dtype, head_dim)
            if reason is None:
                return Choice(name, f"auto: made for {platform}")
            refusals.append(f"not {name}, as {reason}")
    why = "; ".join(refusals) or f"no other is made for {platform}"
    return Choice("blockwise", f"auto: {why}")


def _refusal(
    kernel: PlatformKernel, device: Device, context: int, dtype: DTypeLike, head_dim: int
) -> str | None:
    """Why a kernel can't run on these devices; None if it can."""
    platform = _platform(device)
    if kernel.platform != platform:
        return f"it is made for {kernel.platform}, and the devices are {platform}"
    if context > 1:
        return f"it takes whole rows, and positions are split over context={context} devices"
    return kernel.refusal(device, dtype, head_dim)


def attention(
    inputs: AttentionInputs,
    *,
    windows: Sequence[int] = (),
    mesh: Mesh | None = None,
    kernel: Kernel = "auto",
) -> Float[Array, "B T N H"]:
    """Causal softmax attention with grouped keys and values, scaled by H ** -0.5.

    A position sees earlier ones of its own segment only, and with a window itself and the
    `window - 1` before it. The softmax is in float32, the result in the dtype of the queries.
    Under remat, a policy that saves the name "attention", and `saves_kernel`, runs it only once.

    Args:
      windows: all values that `inputs.window` may have, since kernels other than `blockwise` are
        compiled for each.
      kernel: see `choose`.
    """
    q_BTNH = inputs.q_BTNH
    chosen = choose(kernel, mesh=mesh, dtype=q_BTNH.dtype, head_dim=q_BTNH.shape[3]).kernel
    if chosen == "blockwise":
        return attention_on_mesh(inputs, mesh)
    run = partial(by_window, KERNELS[chosen].run, windows)
    return on_each_device(run, mesh, inputs)


def on_each_device(run: Run, mesh: Mesh | None, inputs: AttentionInputs) -> Array:
    """A kernel on every device, with the rows and heads that can be split evenly over the mesh."""
    if mesh is None or mesh.size == 1:
        return run(inputs)
    q_BTNH, k_BTKH, v_BTKH, *_ = inputs
    rows, _, heads, _ = q_BTNH.shape
    if divides(mesh, "heads", heads) and not divides(mesh, "heads", k_BTKH.shape[2]):
        # Fewer key heads than devices: every device needs the keys of its queries.
        k_BTKH, v_BTKH = (jnp.repeat(x, heads // x.shape[2], axis=2) for x in (k_BTKH, v_BTKH))
    by_head = partition_spec(("batch", None, "heads", None), mesh, q_BTNH.shape)
    by_row = partition_spec(("batch", None), mesh, (rows, 1))
    split = jax.shard_map(
        run,
        mesh=mesh,
        in_specs=(AttentionInputs._make((by_head, by_head, by_head, by_row, PartitionSpec())),),
        out_specs=by_head,
        check_vma=False,  # a kernel does not say over which axes its result varies
    )
    return split(inputs._replace(k_BTKH=k_BTKH, v_BTKH=v_BTKH))


def by_window(run: Run, windows: Sequence[int], inputs: AttentionInputs) -> Array:
    """A kernel that is compiled for one window, once for each of `windows`."""
    window, length = inputs.window, inputs.q_BTNH.shape[1]
    if window is None:
        return run(inputs)
    if not windows:
        raise ValueError("attention: a kernel is compiled for one window: pass all `windows`")
    known = sorted({min(w, length) for w in windows})

    def run_with(window: int | None, inputs: AttentionInputs) -> Array:
        return run(inputs._replace(window=window))

    kernels = [partial(run_with, w if w < length else None) for w in known]
    which = jnp.searchsorted(jnp.asarray(known, jnp.int32), jnp.minimum(window, length))
    return jax.lax.switch(which, kernels, inputs._replace(window=None))


def cached_attention(
    q_B1NH: Float[Array, "B 1 N H"],
    k_BKHS: Float[Array, "B K H S"],
    v_BKSH: Float[Array, "B K S H"],
    segment_ids_BS: Int[Array, "B S"],
    slot: Int[Array, ""],
    window: Int[Array, ""] | int | None = None,
) -> Float[Array, "B 1 N H"]:
    """Attention of one position, which lies in `slot` of a cache, to itself and those before it."""
    rows, _, heads, width = q_B1NH.shape
    q_BKG1H = q_B1NH.reshape(rows, v_BKSH.shape[1], -1, 1, width)
    distance_S = slot - jnp.arange(v_BKSH.shape[2], dtype=jnp.int32)
    visible_BS = (distance_S >= 0) & (segment_ids_BS != 0)
    if window is not None:
        visible_BS = visible_BS & (distance_S < window)
    y_BKG1H, _ = attend(q_BKG1H, k_BKHS.swapaxes(2, 3), v_BKSH, visible_BS[:, None, None, None])
    return y_BKG1H.reshape(rows, 1, heads, width)


def _platform(device: Device) -> str:
    """The platform's name as JAX lowers for it: `tpu`, `cpu`, `cuda`, `rocm`."""
    if device.platform != "gpu":
        return device.platform
    return "rocm" if "rocm" in device.client.platform_version else "cuda"
