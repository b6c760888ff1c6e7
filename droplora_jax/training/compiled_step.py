"""A run's step, compiled while its weights are read."""

from __future__ import annotations

import threading
from collections.abc import Callable
from concurrent.futures import Future
from dataclasses import dataclass
from typing import Any, TypeVar

from droplora_jax.models.layer import Remat

Result = TypeVar("Result")


@dataclass(frozen=True)
class Program:
    """A step for arguments of one shape and place.

    Attributes:
      step: the executable, `(state, mask_keys, frozen, batch, mask_root) -> (state, metrics)`; it
        takes no others, and so is never compiled again.
      remat: what its layers save for their backward pass.
      why: how that was chosen, in words, if it was.
      seconds: what it took to trace and compile.
    """

    step: Any
    remat: Remat
    why: str | None
    seconds: float


def in_background(work: Callable[[], Result]) -> Future[Result]:
    """`work()` in a thread of its own.

    A process that ends in an orderly way ends with it: the compiler can't be stopped, and must not
    be left without an interpreter. `os._exit` waits for nothing.
    """
    future: Future[Result] = Future()

    def run() -> None:
        try:
            future.set_result(work())
        except BaseException as error:  # whoever asks for the result is told
            future.set_exception(error)

    threading.Thread(target=run).start()
    return future
