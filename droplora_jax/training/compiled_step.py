"""A run's training step, compiled while its weights are read."""

from __future__ import annotations

import threading
from collections.abc import Callable, Mapping
from concurrent.futures import Future
from dataclasses import dataclass
from typing import Protocol, TypeVar, runtime_checkable

import jax
from flax import nnx

from droplora_jax.models.layer import Remat
from droplora_jax.training.step import TrainState

Result = TypeVar("Result")


@runtime_checkable
class Step(Protocol):
    """One optimizer step; an executable takes arguments of one shape and layout only."""

    def __call__(
        self,
        state: TrainState,
        mask_keys: nnx.State,
        frozen: nnx.State,
        batch: Mapping[str, jax.Array],
        mask_root: jax.Array,
        /,
    ) -> tuple[TrainState, Mapping[str, jax.Array]]:
        """The next state, and the step's `loss`, `grad_norm` and `tokens`."""
        ...

    def as_text(self) -> str | None:
        """The compiled program; its metadata says which part of the step an instruction is."""
        ...


@dataclass(frozen=True)
class CompiledStep:
    """An executable step: it is never compiled again.

    Attributes:
      step: the executable.
      remat: what its layers save for their backward pass.
      reason: why that was chosen, in words; None if the run's configuration names it.
      seconds: what it took to trace and compile.
    """

    step: Step
    remat: Remat
    reason: str | None
    seconds: float


def in_background(work: Callable[[], Result]) -> Future[Result]:
    """`work()` in a thread of its own.

    The compiler can't be stopped, and must not be left without an interpreter, so an orderly end of
    the process waits for the thread. `os._exit` does not.
    """
    future: Future[Result] = Future()

    def run() -> None:
        try:
            future.set_result(work())
        except BaseException as error:  # raised again where the result is asked for
            future.set_exception(error)

    threading.Thread(target=run).start()
    return future
