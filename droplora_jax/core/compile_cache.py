"""JAX's persistent compilation cache, on unless the user says otherwise."""

from __future__ import annotations

import os
import re
import sys
import warnings
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from typing import Any

from droplora_jax.core.files import cache_folder

VARIABLE = "JAX_COMPILATION_CACHE_DIR"

# What JAX warns, program by program, of a folder that it can't use; it compiles instead.
_FAILED = re.compile(
    r"Error (?:reading|writing) persistent compilation cache entry .*?: (.*)", re.S
)

# Small programs too: a start consists of many. By default JAX keeps what took it a second.
_THRESHOLDS = {
    "jax_persistent_cache_min_compile_time_secs": 0.0,
    "jax_persistent_cache_min_entry_size_bytes": 0,
}


@contextmanager
def compile_cache() -> Iterator[None]:
    """Programs that are compiled in the block are kept in the user's cache folder, and found there.

    What is set already, in the environment or in `jax.config`, stays as it is: the variable
    JAX_COMPILATION_CACHE_DIR names another folder, or, set to nothing, switches the cache off. A
    folder that can't be used costs time only, and is told of once.
    """
    import jax

    config = jax.config
    before = {name: getattr(config, name) for name in ("jax_compilation_cache_dir", *_THRESHOLDS)}
    folder = before["jax_compilation_cache_dir"]
    if folder is None and VARIABLE not in os.environ:
        folder = str(cache_folder("compiled"))
    unset = {name: value for name, value in _THRESHOLDS.items() if name.upper() not in os.environ}
    _update({"jax_compilation_cache_dir": folder, **unset})
    try:
        with _failures_told_once(folder):
            yield
    finally:
        _update(before)


def _update(settings: Mapping[str, object]) -> None:
    import jax

    for name, value in settings.items():
        if getattr(jax.config, name) != value:
            jax.config.update(name, value)


@contextmanager
def _failures_told_once(folder: str | None) -> Iterator[None]:
    told = False
    with warnings.catch_warnings():
        warnings.filterwarnings("always", _FAILED.pattern.partition("(")[0])
        show = warnings.showwarning

        def tell(message: Warning | str, *rest: Any, **named: Any) -> None:
            nonlocal told
            if not (failed := _FAILED.match(str(message))):
                show(message, *rest, **named)
            elif not told:
                told = True
                reason = failed[1].partition("\n")[0]
                print(
                    f"droplora: the compilation cache in {folder} can't be used ({reason}): what "
                    f"it lacks is compiled again. Repair or delete it; {VARIABLE} names another",
                    file=sys.stderr,
                    flush=True,
                )

        warnings.showwarning = tell
        yield
