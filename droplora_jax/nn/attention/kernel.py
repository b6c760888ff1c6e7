"""The contract of an attention kernel: what it reads, and what a file with a kernel defines.

Letters: `B` batch, `T` position, `N` query heads, `K` key/value heads, `H` head width.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, NamedTuple

from jax.typing import DTypeLike
from jaxtyping import Array, Float, Int

Device = Any  # a `jax.Device`, or a device of a topology that is compiled for but not here


class AttentionInputs(NamedTuple):
    """What attention reads.

    Attributes:
      q_BTNH: queries; `N` is a multiple of `K`, and neighbouring query heads share a key head.
      k_BTKH, v_BTKH: keys and values of the same positions.
      segment_ids_BT: a position sees only positions of its own segment; None: the whole row is
        one segment. A segment is a run of positions; 0, padding, is a segment like any other.
      window: how many positions a position sees, itself included; None: all before it. For
        `attention` an array, since layers of one scan may differ in it; for a platform's kernel,
        which is compiled for one window, an int.
    """

    q_BTNH: Float[Array, "B T N H"]
    k_BTKH: Float[Array, "B T K H"]
    v_BTKH: Float[Array, "B T K H"]
    segment_ids_BT: Int[Array, "B T"] | None = None
    window: Int[Array, ""] | int | None = None


@dataclass(frozen=True)
class PlatformKernel:
    """An attention kernel that is made for one platform.

    A file with a kernel defines two functions, `refusal` and one that attends; a line in
    `dispatch.KERNELS` and the name in `options.Kernel` make it a value of `model.attention`.

    The function that attends computes causal softmax attention, scaled by `H ** -0.5`, with the
    softmax in float32 and the result in the dtype of the queries. It runs on one device, with the
    rows and heads that the mesh gives to it (`dispatch.on_each_device`), and must be
    differentiable in queries, keys and values without storing scores [T, T]. Whatever its
    backward pass needs beside its inputs is named "attention" by `checkpoint_name`, so that a
    remat policy can save it; where a kernel of JAX itself does not do that, `dispatch.saves_kernel`
    has to know its primitive. `tests/contracts/test_kernels.py` holds every kernel to this.

    `auto` takes the first kernel listed for the platform that accepts the dtype and the head
    width, and `blockwise`, which runs anywhere, if there is none or if positions are split over
    devices. A kernel that is not `automatic` is taken only by its name.

    Attributes:
      platform: as JAX lowers for it: `tpu`, `cuda`, `rocm` or `cpu`.
      refusal: why the kernel can't run on a device, for a dtype and a head width; None if it can.
      run: attention of what one device has; `window` is an int or None.
      automatic: whether `auto` may take it.
    """

    platform: str
    refusal: Callable[[Device, DTypeLike, int], str | None]
    run: Callable[[AttentionInputs], Float[Array, "B T N H"]]
    automatic: bool = True


def static_window(inputs: AttentionInputs) -> int | None:
    """The window of the inputs of a platform's kernel, which is known when it is compiled."""
    assert inputs.window is None or isinstance(inputs.window, int), "a kernel has one window"
    return inputs.window
