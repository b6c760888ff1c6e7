"""Programs that a model wrote: right ones pass, and no other does or gets away."""

from __future__ import annotations

import os
import socket
import sys
import threading
import time
from collections.abc import Iterable
from pathlib import Path

import pytest

from droplora_jax.core.errors import InputError
from droplora_jax.inference.sandbox import runner
from droplora_jax.inference.sandbox.runner import Limits, run_program

LIMITS = Limits(seconds=1, wall=3, memory=256 << 20, file_size=1 << 20)

ORDINARY = """
import math, re, typing, collections, random, itertools, hashlib, datetime, tempfile, threading, time
import numpy as np
from dataclasses import dataclass

@dataclass
class Example:
    number: 'int'

assert Example(1).number == 1
assert np.arange(3).sum() == 3
open('a', 'w').write('x')
assert open('a').read() == 'x'
with tempfile.TemporaryDirectory() as folder:
    open(folder + '/a', 'w')
print('hello')
threading.Thread(target=time.sleep, args=(60,)).start()  # is left
"""
# What a program does, and what is said about it: of these, a program may do one only.
ENDINGS = {
    "assert 1 == 2, 'no'": "AssertionError: no",
    "def f(:": "SyntaxError",
    "import sys; sys.exit(0)": "SystemExit: 0",
    "import os; os._exit(0)": "exit code 0",
    "raise KeyboardInterrupt": "KeyboardInterrupt",
    "import time; time.sleep(60)": "killed: more than 3 s",
    "try:\n    while True: pass\nexcept BaseException: pass": "killed: more than",
    "x = []\nwhile True: x.append(' ' * 10**6)": "MemoryError",
    "import ctypes; ctypes.string_at(0)": "killed by signal 11",
    "while True: print('x' * 1000)": "printed more than",
    "import os; os.fork()": "os.fork: not allowed",
}
# What raises an error, so that one program can do all of it.
ERRORS = {
    "x = [0] * 10**9": "MemoryError",
    "def f(): f()\nf()": "RecursionError",
    "open('big', 'w').write('x' * 2**21)": "OSError: [Errno 27] File too large",
    "input()": "EOFError",
    "exit(0)": "NameError|SystemExit",
    "import multiprocessing as m\nm.Process(target=print).start()": "not allowed",
    "import subprocess; subprocess.run(['true'])": "subprocess.Popen: not allowed",
    "import os; os.system('true')": "os.system: not allowed",
    "import os; os.kill(os.getppid(), 9)": "os.kill: not allowed",
    "import ctypes; ctypes.CDLL(None).fork()": "ctypes.dlsym: not allowed",
    "import socket; socket.socket()": "socket.__new__: not allowed",
    "import urllib.request as r; r.urlopen('http://127.0.0.1:9')": "not allowed",
}
# Runs each of {attempts}, and prints a line with its error.
ATTEMPTS = """
for source in {attempts!r}:
    try:
        exec(source, {{}})
        print('no error')
    except BaseException as error:
        print(type(error).__name__ + ': ' + str(error))
"""


def errors_of(attempts: Iterable[str]) -> list[str]:
    """The error of each of several pieces of Python, one after the other in one program."""
    ending = run_program(ATTEMPTS.format(attempts=list(attempts)), LIMITS)
    assert ending.passed, ending
    return ending.output.splitlines()


def test_a_program_that_runs_to_its_end_passes():
    ending = run_program(ORDINARY, Limits(memory=1 << 30))
    assert ending.passed, ending
    assert ending.reason == ""


@pytest.mark.parametrize(("source", "reason"), ENDINGS.items(), ids=range(len(ENDINGS)))
def test_any_other_fails_and_says_why(source, reason):
    ending = run_program(source, LIMITS)
    assert not ending.passed
    assert reason in ending.reason, ending


def test_what_is_too_much_or_not_allowed_raises_an_error():
    for error, (source, expected) in zip(errors_of(ERRORS), ERRORS.items(), strict=True):
        assert any(part in error for part in expected.split("|")), (source, error)


def test_what_is_printed_is_kept():
    ending = run_program("import sys; print('out'); print('err', file=sys.stderr); assert 0")
    assert "out" in ending.output
    assert "err" in ending.output


CHANGES = [
    "open({path!r}, 'w')",
    "open({path!r}, 'a')",
    "import os; os.open({path!r}, os.O_CREAT | os.O_WRONLY)",
    "import os; os.remove({path!r})",
    "import os; os.rename({path!r}, 'mine')",
    "import os; os.truncate({path!r}, 0)",
    "import shutil; shutil.rmtree({folder!r})",
    "import pathlib; pathlib.Path({path!r}).unlink()",
    "import os; os.symlink({folder!r}, 'link'); open('link/kept', 'w')",
]


def test_files_outside_its_folder_stay_as_they_are(tmp_path):
    kept = tmp_path / "kept"
    kept.write_text("as it was")
    changes = [change.format(path=str(kept), folder=str(tmp_path)) for change in CHANGES]
    for change, error in zip(changes, errors_of(changes), strict=True):
        assert error.startswith("PermissionError"), change
        assert "is outside the folder" in error, change
    assert [file.name for file in tmp_path.iterdir()] == ["kept"]
    assert kept.read_text() == "as it was"


def test_nothing_is_left(tmp_path, monkeypatch):
    monkeypatch.setattr(runner.tempfile, "tempdir", str(tmp_path))
    run_program("open('a', 'w').write('x')")
    run_program("while True: pass", LIMITS)
    assert list(tmp_path.iterdir()) == []


def test_the_users_environment_is_not_passed_on(monkeypatch):
    monkeypatch.setenv("SECRET_KEY", "s3cret")
    ending = run_program(
        "import os; print(sorted(os.environ)); assert 'SECRET_KEY' not in os.environ"
    )
    assert ending.passed, ending


# A process started behind the interpreter's back, by the function under `subprocess`.
STARTS_SLEEP = """
import _posixsubprocess, os, time
r, w = os.pipe()
pid = _posixsubprocess.fork_exec(
    [b"MARK", b"60"], [b"/bin/sleep"], True, (w,), None, None, -1, -1, -1, -1, -1, -1, r, w,
    False, DETACHED, -1, None, None, None, -1, None, False,
)
os.close(w)
assert not os.read(r, 1)  # it runs now
"""


@pytest.mark.skipif(sys.version_info[:2] != (3, 11), reason="fork_exec takes other arguments")
@pytest.mark.parametrize("apart", [True, False])
def test_a_process_that_was_started_all_the_same_dies_with_it(monkeypatch, apart):
    if apart and not runner.namespaces():
        pytest.skip("no namespaces for an ordinary user here")
    if not apart:
        monkeypatch.setattr(runner, "namespaces", lambda: ())
    mark = f"sleep-{os.getpid()}-{apart}"
    # Only namespaces hold a process that leaves its group.
    source = STARTS_SLEEP.replace("MARK", mark).replace("DETACHED", str(apart))
    ending = run_program(source + "time.sleep(60)", LIMITS)
    assert "killed" in ending.reason
    assert run_program(source, LIMITS).passed
    deadline = time.monotonic() + 5
    while (alive := _running(mark)) and time.monotonic() < deadline:
        time.sleep(0.05)
    assert not alive


def _running(mark: str) -> bool:
    for file in Path("/proc").glob("[0-9]*/cmdline"):
        try:
            if file.read_bytes().startswith(mark.encode()):
                return True
        except OSError:
            continue
    return False


def test_no_network_even_behind_the_interpreters_back(tmp_path, monkeypatch):
    """The kernel's own separation, with the interpreter's guard taken away."""
    if not runner.namespaces():
        pytest.skip("no namespaces for an ordinary user here")
    source = Path(runner.child.__file__).read_text().replace('"socket.__new__",', "")
    with socket.create_server(("127.0.0.1", 0)) as server:
        port = server.getsockname()[1]
        threading.Thread(target=lambda: server.accept(), daemon=True).start()
        connect = f"import socket; socket.create_connection(('127.0.0.1', {port}), 2)"
        copy = tmp_path / "child.py"
        copy.write_text(source)
        monkeypatch.setattr(runner.child, "__file__", str(copy))
        inside = run_program(connect)
        monkeypatch.setattr(runner, "namespaces", lambda: ())
        outside = run_program(connect)
    assert "Errno" in inside.reason
    assert outside.passed  # so the test would see it


def test_the_same_programs_without_namespaces(monkeypatch):
    monkeypatch.setattr(runner, "namespaces", lambda: ())
    assert run_program("assert 1 + 1 == 2").passed
    for source in ("import os; os._exit(0)", "while True: pass", "import socket; socket.socket()"):
        assert not run_program(source, LIMITS).passed


def test_limits_that_cannot_be_set_are_an_error_and_no_wrong_answer():
    with pytest.raises(InputError, match="limits can't be set here"):
        run_program("assert True", Limits(memory=1 << 80))
