"""Runs one program in this process, which is limited first: `python -I child.py < REQUEST`.

The request is a JSON object: `source`, `folder` (the only place it may write to), `memory` and
`file_size` in bytes, `seconds` of processor time and `wall` seconds in all, and a `secret`. What
goes to the standard output is "ready" once the limits stand, and the secret once the program has
run to its end; what the program prints goes to the standard error.
"""

from __future__ import annotations

import json
import os
import resource
import signal
import sys
import traceback
from collections.abc import Callable
from types import ModuleType
from typing import Any, NoReturn

# What a program has no need of: other processes, the network, and ways around this list.
DENIED = frozenset(
    {
        "ctypes.dlsym",
        "ctypes.dlsym/handle",
        "os.exec",
        "os.fork",
        "os.forkpty",
        "os.kill",
        "os.killpg",
        "os.posix_spawn",
        "os.spawn",
        "os.startfile",
        "os.system",
        "pty.spawn",
        "signal.pthread_kill",
        "socket.__new__",
        "subprocess.Popen",
    }
)
# What changes files, beside opening them, and how many of its arguments are paths.
CHANGES = {
    "os.chflags": 1,
    "os.chmod": 1,
    "os.chown": 1,
    "os.link": 2,
    "os.mkdir": 1,
    "os.remove": 1,
    "os.removexattr": 1,
    "os.rename": 2,
    "os.rmdir": 1,
    "os.setxattr": 1,
    "os.symlink": 2,
    "os.truncate": 1,
    "os.utime": 1,
    "sqlite3.connect": 1,
}
WRITES = os.O_WRONLY | os.O_RDWR | os.O_CREAT | os.O_TRUNC | os.O_APPEND


def limit(request: dict[str, Any]) -> None:
    """Limits that the kernel holds the process to."""
    seconds = request["seconds"]
    signal.alarm(request["wall"])  # also when nobody waits for it any more
    for kind, value in (
        (resource.RLIMIT_AS, request["memory"]),
        (resource.RLIMIT_FSIZE, request["file_size"]),
        (resource.RLIMIT_NOFILE, 64),
        (resource.RLIMIT_CORE, 0),
    ):
        resource.setrlimit(kind, (value, value))
    resource.setrlimit(resource.RLIMIT_CPU, (seconds, seconds + 1))  # SIGXCPU, then SIGKILL


def guard(folder: str) -> Callable[[str, tuple[Any, ...]], None]:
    """An audit hook: what the interpreter is told not to do. It can't be removed again."""
    inside = os.path.realpath(folder)
    realpath, isdir = os.path.realpath, os.path.isdir
    fsdecode, devnull = os.fsdecode, os.devnull

    def check(event: str, path: Any) -> None:
        if isinstance(path, int):  # open already
            return
        name = fsdecode(path)
        if name != devnull and not f"{realpath(name)}/".startswith(f"{inside}/"):
            raise PermissionError(f"{event}: {name!r} is outside the folder of this program")

    def hook(event: str, arguments: tuple[Any, ...]) -> None:
        if event in DENIED:
            raise PermissionError(f"{event}: not allowed to this program")
        if event == "open":
            path, _, flags = arguments
            # A descriptor of a folder would be a way to the files in it.
            if flags & WRITES or (not isinstance(path, int) and isdir(path)):
                check(event, path)
        for path in arguments[: CHANGES.get(event, 0)]:
            check(event, path)

    return hook


def run(source: str) -> bool:
    """Whether a program runs to its end. One that leaves early, in whatever way, does not."""
    module = ModuleType("program")
    sys.modules["program"] = module
    try:
        exec(compile(source, "program.py", "exec"), module.__dict__)
    except BaseException:  # SystemExit above all
        traceback.print_exc()
        return False
    return True


def contained(request: dict[str, Any], verdict: int) -> NoReturn:
    """The program, and the end of this process: no thread or handler of its own delays it."""
    os.chdir(request["folder"])
    limit(request)
    write, leave = os.write, os._exit
    write(verdict, b"ready\n")
    sys.addaudithook(guard(request["folder"]))
    passed = run(request["source"])
    try:
        sys.stdout.flush()
    finally:
        if passed:
            write(verdict, request["secret"].encode())
        leave(not passed)


def main() -> None:
    """The program is a child once more: the first process of a namespace ignores most signals."""
    request, verdict = json.load(sys.stdin), os.dup(1)
    os.dup2(2, 1)
    os.dup2(os.open(os.devnull, os.O_RDONLY), 0)
    pid = os.fork()
    if pid == 0:
        contained(request, verdict)
    code = os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1])
    sys.exit(code if code >= 0 else 128 - code)


if __name__ == "__main__":
    main()
