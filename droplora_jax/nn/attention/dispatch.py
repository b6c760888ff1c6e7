"""Causal attention: one function, by the kernel that is best where it runs.

Letters: `B` batch, `T` position, `S` slot of a cache, `N` query heads, `K` key/value heads,
`H` head width.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from types import MappingProxyType
from typing import Any, get_args

import jax
import jax.numpy as jnp
from jax.sharding import Mesh, PartitionSpec
from jaxtyping import Array, Float, Int

from droplora_jax.core.errors import InputError
from droplora_jax.core.sharding import divides, partition_spec
from droplora_jax.nn.attention import cudnn, splash, tokamax
from droplora_jax.nn.attention.blockwise import attend
from droplora_jax.nn.attention.context_parallel import dealt_attention
from droplora_jax.nn.options import Kernel


@dataclass(frozen=True)
class OfPlatform:
    """A kernel that is made for one platform; `blockwise` is for every one.

    Attributes:
      refusal: why it can't be taken on a device of it, with a dtype and heads of a width.
      run: `attention` of what one device has, with a window that is an int.
      skips: keys of other segments, and so is ahead where a row has several.
    """

    platform: str
    refusal: Callable[[Any, Any, int], str | None]
    run: Callable[..., Array]
    skips: bool = False


# Of a platform's, `auto` takes the first that it can, and of rows of one segment last what skips.
KERNELS: Mapping[Kernel, OfPlatform] = MappingProxyType(
    {
        "splash": OfPlatform("tpu", splash.refusal, splash.splash_attention),
        "tokamax": OfPlatform("cuda", tokamax.refusal, tokamax.tokamax_attention, skips=True),
        "cudnn": OfPlatform("cuda", cudnn.refusal, cudnn.cudnn_attention),
    }
)

# What `jax.checkpoint` finds named `attention` in the other kernels.
saved_of_kernels = cudnn.is_forward


@dataclass(frozen=True)
class Choice:
    """The kernel that is taken, and why."""

    kernel: Kernel
    why: str

    def __str__(self) -> str:
        return f"{self.kernel} ({self.why})"


def choose(
    asked: Kernel, *, mesh: Mesh | None, dtype: Any, head_dim: int, packed: bool = True
) -> Choice:
    """The kernel for activations of a dtype and heads of a width on the devices of a mesh.

    Args:
      packed: whether rows have segments.

    Raises:
      InputError: the kernel that is asked for can't be had there.
    """
    if asked not in (known := get_args(Kernel)):
        raise InputError(f"model.attention={asked!r}: must be one of {', '.join(known)}")
    device = jax.local_devices()[0] if mesh is None else mesh.devices.flat[0]
    platform, split = _platform(device), 1 if mesh is None else mesh.shape["context"]
    if asked == "blockwise":
        return Choice(asked, "asked for")

    def refusal(own: OfPlatform) -> str | None:
        if own.platform != platform:
            return f"it is made for {own.platform}, and the devices are {platform}"
        if split > 1:
            return f"it takes whole rows, and positions are split over mesh.context={split}"
        return own.refusal(device, dtype, head_dim)

    if asked != "auto":
        if (reason := refusal(KERNELS[asked])) is not None:
            raise InputError(f"model.attention={asked!r}: {reason}; use auto, or blockwise")
        return Choice(asked, "asked for")
    made = [name for name, own in KERNELS.items() if own.platform == platform]
    refused: dict[str, list[str]] = {}
    for name in sorted(made, key=lambda name: KERNELS[name].skips and not packed):
        if (reason := refusal(KERNELS[name])) is None:
            return Choice(name, f"auto: made for {platform}")
        refused.setdefault(reason, []).append(f"not {name}")
    why = "; ".join(f"{', '.join(names)}, as {reason}" for reason, names in refused.items())
    return Choice("blockwise", f"auto: {why or f'no other is made for {platform}'}")


def attention(
    q_BTNH: Float[Array, "B T N H"],
    k_BTKH: Float[Array, "B T K H"],
    v_BTKH: Float[Array, "B T K H"],
    segment_ids_BT: Int[Array, "B T"] | None = None,
    window: Int[Array, ""] | None = None,
    *,
    windows: Sequence[int] = (),
    mesh: Mesh | None = None,
    kernel: Kernel = "auto",
) -> Float[Array, "B T N H"]:
    """Causal softmax attention with grouped keys and values, scaled by H ** -0.5.

    A position sees earlier ones of its own segment only, and with a `window` itself and the
    `window - 1` before it. The softmax is in float32, the result in the dtype of `q`. Under remat,
    a policy that saves the name `attention`, and `saved_of_kernels`, runs it once.

    Args:
      windows: all that `window` may be: kernels other than `blockwise` are made for each.
      kernel: see `choose`.
    """
    packed, head_dim = segment_ids_BT is not None, q_BTNH.shape[3]
    chosen = choose(kernel, mesh=mesh, dtype=q_BTNH.dtype, head_dim=head_dim, packed=packed).kernel
    arguments = (q_BTNH, k_BTKH, v_BTKH, segment_ids_BT, window)
    if chosen == "blockwise":
        return dealt_attention(*arguments, mesh=mesh)
    run = partial(by_window, KERNELS[chosen].run, windows)
    return on_each_device(run, mesh, *arguments)


def on_each_device(
    run: Callable[..., Array],
    mesh: Mesh | None,
    q_BTNH: Float[Array, "B T N H"],
    k_BTKH: Float[Array, "B T K H"],
    v_BTKH: Float[Array, "B T K H"],
    segment_ids_BT: Int[Array, "B T"] | None,
    window: Int[Array, ""] | None,
) -> Float[Array, "B T N H"]:
    """Every device with its rows and heads, or with all of those that can't be split evenly."""
    if mesh is None or mesh.size == 1:
        return run(q_BTNH, k_BTKH, v_BTKH, segment_ids_BT, window)
    rows, _, heads, _ = q_BTNH.shape
    if divides(mesh, "heads", heads) and not divides(mesh, "heads", k_BTKH.shape[2]):
        # Every device needs the keys of its queries.
        k_BTKH, v_BTKH = (jnp.repeat(x, heads // x.shape[2], axis=2) for x in (k_BTKH, v_BTKH))
    of_heads = partition_spec(("batch", None, "heads", None), mesh, q_BTNH.shape)
    of_rows = partition_spec(("batch", None), mesh, (rows, 1))
    split = jax.shard_map(
        run,
        mesh=mesh,
        in_specs=(of_heads, of_heads, of_heads, of_rows, PartitionSpec()),
        out_specs=of_heads,
        check_vma=False,  # a kernel does not say over which axes its result varies
    )
    return split(q_BTNH, k_BTKH, v_BTKH, segment_ids_BT, window)


def by_window(
    by: Callable[..., Array],
    windows: Sequence[int],
    q_BTNH: Float[Array, "B T N H"],
    k_BTKH: Float[Array, "B T K H"],
    v_BTKH: Float[Array, "B T K H"],
    segment_ids_BT: Int[Array, "B T"] | None,
    window: Int[Array, ""] | None,
) -> Float[Array, "B T N H"]:
    """A kernel that is made for one window, as many times as there are windows."""
    arguments, length = (q_BTNH, k_BTKH, v_BTKH, segment_ids_BT), q_BTNH.shape[1]
    if window is None:
        return by(*arguments, None)
    if not windows:
        raise ValueError("attention: a kernel is made for one window: say which there may be")
    known = sorted({min(w, length) for w in windows})
    kernels = [partial(by, window=w if w < length else None) for w in known]
    which = jnp.searchsorted(jnp.asarray(known, jnp.int32), jnp.minimum(window, length))
    return jax.lax.switch(which, kernels, *arguments)


def cached_attention(
    q_B1NH: Float[Array, "B 1 N H"],
    k_BKHS: Float[Array, "B K H S"],
    v_BKSH: Float[Array, "B K S H"],
    segment_ids_BS: Int[Array, "B S"],
    slot: Int[Array, ""],
    window: Int[Array, ""] | None = None,
) -> Float[Array, "B 1 N H"]:
    """The same of one position, in `slot`, with itself and those before it."""
    rows, _, heads, width = q_B1NH.shape
    q_BKG1H = q_B1NH.reshape(rows, v_BKSH.shape[1], -1, 1, width)
    distance_S = slot - jnp.arange(v_BKSH.shape[2], dtype=jnp.int32)
    visible_BS = (distance_S >= 0) & (segment_ids_BS != 0)
    if window is not None:
        visible_BS = visible_BS & (distance_S < window)
    y_BKG1H, _ = attend(q_BKG1H, k_BKHS.swapaxes(2, 3), v_BKSH, visible_BS[:, None, None, None])
    return y_BKG1H.reshape(rows, 1, heads, width)


def _platform(device: Any) -> str:
    """As JAX lowers for it: `tpu`, `cpu`, `cuda`, `rocm`."""
    if device.platform != "gpu":
        return device.platform
    return "rocm" if "rocm" in device.client.platform_version else "cuda"
