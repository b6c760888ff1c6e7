"""Signals that ask a command to stop: kept until a run can, or raised at once."""

from __future__ import annotations

import signal
from collections.abc import Iterator
from contextlib import contextmanager
from types import FrameType


@contextmanager
def collected() -> Iterator[list[int]]:
    """Collects SIGINT and SIGTERM while the block runs; a second SIGINT acts at once."""
    received: list[int] = []

    def receive(number: int, frame: FrameType | None) -> None:
        if received and number == signal.SIGINT:
            raise KeyboardInterrupt
        received.append(number)

    handlers = {
        number: signal.signal(number, receive) for number in (signal.SIGINT, signal.SIGTERM)
    }
    try:
        yield received
    finally:
        for number, handler in handlers.items():
            signal.signal(number, handler)


class Terminated(BaseException):
    """SIGTERM; as KeyboardInterrupt, it is not an error that anything handles on the way."""


@contextmanager
def raised() -> Iterator[None]:
    """SIGTERM raises `Terminated` in the block, so that what is half-written is taken away."""

    def receive(number: int, frame: FrameType | None) -> None:
        raise Terminated

    handler = signal.signal(signal.SIGTERM, receive)
    try:
        yield
    finally:
        signal.signal(signal.SIGTERM, handler)
