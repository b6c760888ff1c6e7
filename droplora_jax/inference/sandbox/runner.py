"""Runs a program that a model wrote in a process of its own, with limits, and says how it ended.

Three layers stand between such a program and the machine:

- the kernel's limits: memory, processor time, size of files, and time in all, after which the
  process and all it started are killed;
- where the system lets an ordinary user make them (most Linux systems), namespaces of its own: no
  network device but an unconnected one, and no process but its own, all of which end with it;
- a hook in the interpreter that denies sockets, other processes, and writing outside a temporary
  folder. It stops ordinary Python; a program written to break out of an interpreter can.

Without namespaces the hook alone keeps it from the network, and a process that it starts all the
same and detaches may outlive it. In any case it can read what this user can read. For models that
you do not trust run the whole evaluation in a container or a virtual machine.
"""

from __future__ import annotations

import json
import os
import secrets
import shutil
import signal
import subprocess
import sys
import tempfile
from contextlib import suppress
from dataclasses import dataclass
from functools import cache
from pathlib import Path

from droplora_jax.core.errors import InputError
from droplora_jax.inference.sandbox import child

SHOWN = 4000  # characters of output that are kept, from the end


@dataclass(frozen=True)
class Limits:
    """What a program may use: processor and wall time in seconds, sizes in bytes."""

    seconds: int = 10
    wall: int = 30
    memory: int = 1 << 30
    file_size: int = 16 << 20


@dataclass(frozen=True)
class Ending:
    """How a program ended.

    Attributes:
      passed: it ran to its end.
      reason: why it did not.
      output: the end of what it printed, errors included.
    """

    passed: bool
    reason: str
    output: str


def run_program(source: str, limits: Limits = Limits()) -> Ending:
    """Run Python source in a process of its own and wait until it has ended.

    The program passes only if it ran to its end: the child then prints a secret that the program
    is not told, so that a program can't claim by leaving early that it passed. It starts in an
    empty folder, the only place where it may write, without arguments, input or this user's
    environment; the folder, the process and what it started are gone when this returns. A program
    that exceeds a limit has not passed, and `reason` says which. Several may be run at once, from
    threads.

    Args:
      source: of a whole program, in UTF-8.
      limits: of the program, not of the interpreter's start.

    Raises:
      InputError: no process with these limits can be started here.
    """
    with tempfile.TemporaryDirectory(prefix="droplora-", ignore_cleanup_errors=True) as name:
        outer = Path(name)
        inner = outer / "program"
        inner.mkdir()
        secret = secrets.token_hex(16)
        request = {"source": source, "folder": str(inner), "secret": secret, **vars(limits)}
        (outer / "request").write_text(json.dumps(request), encoding="utf-8")
        code = _wait(outer, inner, limits.wall + 5)
        stage, _, told = (outer / "verdict").read_text().partition("\n")
        printed = (outer / "output").read_bytes()
    output = printed[-4 * SHOWN :].decode(errors="replace")[-SHOWN:]
    if stage != "ready":
        raise InputError(
            "no process to run the model's code in: its limits can't be set here "
            f"({_last_line(output) or f'exit code {code}'})"
        )
    passed = told == secret
    if not passed and len(printed) >= limits.file_size:
        return Ending(False, f"printed more than {limits.file_size} bytes", output)
    return Ending(passed, "" if passed else _reason(code, output, limits), output)


def _wait(outer: Path, inner: Path, seconds: int) -> int:
    """The exit code of the child; negative for the signal that killed it."""
    interpreter = [sys.executable, "-I", "-B", "-X", "utf8", child.__file__]
    with (
        (outer / "request").open() as request,
        (outer / "verdict").open("w") as verdict,
        (outer / "output").open("w") as output,
    ):
        process = subprocess.Popen(
            [*namespaces(), *interpreter],
            stdin=request,
            stdout=verdict,
            stderr=output,
            cwd=inner,
            env=_environment(inner),
            start_new_session=True,
        )
        try:
            return process.wait(seconds)
        except subprocess.TimeoutExpired:
            return -signal.SIGALRM
        finally:
            _kill(process)


def _kill(process: subprocess.Popen[bytes]) -> None:
    with suppress(ProcessLookupError):
        os.killpg(process.pid, signal.SIGKILL)  # its children outlive it
    process.wait()


def _environment(home: Path) -> dict[str, str]:
    """Nothing of this user's environment, such as keys, and one thread for numerical libraries."""
    threads = ("OMP_NUM_THREADS", "OPENBLAS_NUM_THREADS", "MKL_NUM_THREADS")
    return {
        "PATH": os.defpath,
        "HOME": str(home),
        "TMPDIR": str(home),
        "PYTHONHASHSEED": "0",
        **dict.fromkeys(threads, "1"),
    }


@cache
def namespaces() -> tuple[str, ...]:
    """The command before which a process gets a network and processes of its own; or nothing."""
    tool = shutil.which("unshare")
    if tool is None:
        return ()
    command = (tool, "--user", "--map-current-user", "--net", "--ipc", "--pid", "--kill-child")
    try:
        tried = subprocess.run(
            [*command, sys.executable, "-I", "-c", ""], capture_output=True, timeout=30
        )
    except (OSError, subprocess.TimeoutExpired):
        return ()
    return () if tried.returncode else command


def _reason(code: int, output: str, limits: Limits) -> str:
    number = -code if code < 0 else code - 128
    if number == signal.SIGXCPU:
        return f"killed: more than {limits.seconds} s of processor time"
    if number == signal.SIGALRM:
        return f"killed: more than {limits.wall} s"
    if number > 0:
        return f"killed by signal {number}"
    return _last_line(output) or f"ended early with exit code {code}"


def _last_line(output: str) -> str:
    lines = output.strip().splitlines()
    return lines[-1][:200] if lines else ""
