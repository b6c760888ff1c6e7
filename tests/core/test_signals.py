"""A signal that asks to stop is heard wherever it comes."""

from __future__ import annotations

import gc
import os
import signal
import time

import pytest

from droplora_jax.core import signals

ERRORS = {signal.SIGINT: KeyboardInterrupt, signal.SIGTERM: signals.Terminated}


@pytest.fixture(params=ERRORS, ids=lambda number: number.name)
def number(request):
    return request.param


@signals.raised()
def during(work) -> None:
    work()
    for _ in range(500):
        time.sleep(0.01)


def test_it_raises_at_once(number):
    def work():
        signal.raise_signal(number)
        raise AssertionError

    with pytest.raises(ERRORS[number]):
        during(work)


def test_in_a_garbage_collection_of_jax_it_raises_later(number):
    """What is raised there Python only prints."""

    def _xla_gc_callback(phase, info):
        if phase == "start":
            gc.callbacks.remove(_xla_gc_callback)
            signal.raise_signal(number)

    gc.callbacks.append(_xla_gc_callback)
    with pytest.raises(ERRORS[number]):
        during(gc.collect)


def test_at_the_end_of_an_object_it_raises_later(number):
    class Dying:
        def __del__(self):
            signal.raise_signal(number)

    with pytest.raises(ERRORS[number]):
        during(Dying)


def test_what_was_ignored_stays_ignored_and_handlers_come_back(number):
    before = signal.signal(number, signal.SIG_IGN)
    try:
        with signals.raised():
            os.kill(os.getpid(), number)
            time.sleep(0.02)
        assert signal.getsignal(number) is signal.SIG_IGN
    finally:
        signal.signal(number, before)
    with signals.raised():
        assert signal.getsignal(number) is not before
    assert signal.getsignal(number) is before
