"""How fast a matrix product is here: what a step's operations are measured against."""

from __future__ import annotations

import time
from dataclasses import dataclass
from typing import Any

from workers import Unavailable

_REPEAT = 10  # products in one program


@dataclass(frozen=True)
class Peak:
    """The product of two square matrices of this size, in JAX or in PyTorch."""

    framework: str
    size: int

    masked = False

    @property
    def packages(self) -> tuple[str, ...]:
        return (self.framework,)

    def prepare(self, work: Any) -> Any:
        return {"jax": Jax, "torch": Torch}[self.framework](self.size, work)


class Jax:
    def __init__(self, size: int, work: Any) -> None:
        import jax
        import jax.numpy as jnp

        if jax.devices()[0].platform != work.device:
            raise Unavailable(f"JAX sees no {work.device.upper()}")
        key = jax.random.key(0)
        self.x = jax.random.normal(key, (size, size), jnp.dtype(work.dtype)) / size**0.5
        repeated = jax.jit(lambda x: jax.lax.fori_loop(0, _REPEAT, lambda _, y: y @ x, x))
        self.product = lambda: repeated(self.x).block_until_ready()
        self.operations = 2 * _REPEAT * size**3

    def run(self) -> float:
        """Operations a second, at best."""
        self.product()
        return self.operations / min(_seconds(self.product) for _ in range(10))


class Torch(Jax):
    def __init__(self, size: int, work: Any) -> None:
        import torch

        gpu = work.device == "gpu"
        if gpu and not torch.cuda.is_available():
            raise Unavailable("PyTorch sees no GPU")
        device = "cuda" if gpu else "cpu"
        dtype = getattr(torch, work.dtype)
        self.x = torch.randn(size, size, device=device).to(dtype) / size**0.5

        def product() -> None:
            y = self.x
            for _ in range(_REPEAT):
                y = y @ self.x
            if gpu:
                torch.cuda.synchronize()

        self.product, self.operations = product, 2 * _REPEAT * size**3


def _seconds(call: Any) -> float:
    begin = time.perf_counter()
    call()
    return time.perf_counter() - begin
