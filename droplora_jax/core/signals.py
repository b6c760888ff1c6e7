"""Signals that ask a command to stop: collected until a run can stop, or raised at once."""

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

    A block that still runs `seconds` after a SIGTERM is ended with the process, which prints
    `last_words()` first.
    """
    received: list[int] = []

    def receive(number: int, frame: FrameType | None) -> None:
        if received and number == signal.SIGINT:
            raise KeyboardInterrupt
        received.append(number)

    with _deadline(seconds, last_words):
        handlers = {
            number: signal.signal(number, receive) for number in (signal.SIGINT, signal.SIGTERM)
        }
        try:
            yield received
        finally:
            for number, handler in handlers.items():
                signal.signal(number, handler)


@contextmanager
def _deadline(seconds: float, last_words: Callable[[], str]) -> Iterator[None]:
    """Ends the process `seconds` after a SIGTERM, whatever its main thread does.

    Python runs signal handlers in the main thread, which may hang in a step; a thread does not.
    """
    read, write = os.pipe()
    os.set_blocking(write, False)
    over = threading.Event()

    def watch() -> None:
        while number := os.read(read, 1):
            if number[0] == signal.SIGTERM and not over.wait(seconds):
                _end(last_words)

    watcher = threading.Thread(target=watch, daemon=True)
    before = signal.set_wakeup_fd(write)
    watcher.start()
    try:
        yield
    finally:
        over.set()
        signal.set_wakeup_fd(before)
        os.close(write)
        watcher.join()
        os.close(read)


def _end(last_words: Callable[[], str]) -> None:
    try:
        print(f"droplora: {last_words()}", file=sys.stderr, flush=True)
    finally:
        os._exit(128 + signal.SIGTERM)


class Terminated(BaseException):
    """SIGTERM. A BaseException like KeyboardInterrupt, so that no handler of errors catches it."""


@contextmanager
def raised() -> Iterator[None]:
    """In the block SIGINT raises KeyboardInterrupt and SIGTERM raises `Terminated`.

    Both unwind the stack, so that half-written files are removed. Where Python would swallow an
    exception, raising is retried a little later. A signal that is ignored stays ignored.
    """
    errors = {signal.SIGINT: KeyboardInterrupt, signal.SIGTERM: Terminated}
    pending: list[type[BaseException]] = []

    def receive(number: int, frame: FrameType | None) -> None:
        if number in errors:
            pending.append(errors[signal.Signals(number)])
        if _ignores_errors(frame):
            signal.setitimer(signal.ITIMER_REAL, 0.01)  # then try again
        elif pending:
            error = pending[-1]
            pending.clear()
            raise error

    numbers = [n for n in errors if signal.getsignal(n) is not signal.SIG_IGN]
    handlers = {number: signal.signal(number, receive) for number in (*numbers, signal.SIGALRM)}
    try:
        yield
    finally:
        for number, handler in handlers.items():
            signal.signal(number, handler)


def _ignores_errors(frame: FrameType | None) -> bool:
    """Whether Python swallows exceptions at a frame: in JAX's callback of a garbage collection, or
    in `__del__`."""
    while frame is not None:
        if frame.f_code.co_name in ("_xla_gc_callback", "__del__"):
            return True
        frame = frame.f_back
    return False
