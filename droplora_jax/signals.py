"""Signals that ask a command to stop: kept until a run can, or raised at once."""

from __future__ import annotations

import os
import signal
import sys
import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from types import FrameType


@contextmanager
def collected(seconds: float, last_words: Callable[[], str]) -> Iterator[list[int]]:
    """Collects SIGINT and SIGTERM while the block runs; a second SIGINT acts at once.

    After a SIGTERM the block has so many seconds; then the process says its last words and ends.
    """
    received: list[int] = []
    timer = threading.Timer(seconds, _end, [last_words])
    timer.daemon = True

    def receive(number: int, frame: FrameType | None) -> None:
        if received and number == signal.SIGINT:
            raise KeyboardInterrupt
        if number == signal.SIGTERM and number not in received:
            timer.start()
        received.append(number)

    handlers = {
        number: signal.signal(number, receive) for number in (signal.SIGINT, signal.SIGTERM)
    }
    try:
        yield received
    finally:
        timer.cancel()
        for number, handler in handlers.items():
            signal.signal(number, handler)


def _end(last_words: Callable[[], str]) -> None:
    print(f"droplora: {last_words()}", file=sys.stderr, flush=True)
    os._exit(128 + signal.SIGTERM)


class Terminated(BaseException):
    """SIGTERM; as KeyboardInterrupt, it is not an error that anything handles on the way."""


@contextmanager
def raised() -> Iterator[None]:
    """SIGTERM raises `Terminated` in the block, so that what is half-written is taken away."""

    def receive(number: int, frame: FrameType | None) -> None:
        if frame is not None and frame.f_code.co_name == "_xla_gc_callback":
            # JAX's, called while garbage is collected: what is raised in it is ignored.
            signal.setitimer(signal.ITIMER_REAL, 0.01)
        else:
            raise Terminated

    numbers = (signal.SIGTERM, signal.SIGALRM)
    handlers = {number: signal.signal(number, receive) for number in numbers}
    try:
        yield
    finally:
        for number, handler in handlers.items():
            signal.signal(number, handler)
