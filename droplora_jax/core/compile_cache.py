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

# JAX's warning about a program whose cache entry it can't read or write; it then compiles.
_FAILED = re.compile(
    r"Error (?:reading|writing) persistent compilation cache entry .*?: (.*)", re.S
)

# Keep small programs too, since a start compiles many. JAX's default is those of a second or more.
_THRESHOLDS = {
    "jax_persistent_cache_min_compile_time_secs": 0.0,
    "jax_persistent_cache_min_entry_size_bytes": 0,
}


@contextmanager
def compile_cache() -> Iterator[None]:
    """Programs that are compiled in the block are kept in the user's cache folder.

    Settings in the environment or in `jax.config` take precedence: JAX_COMPILATION_CACHE_DIR names
    another folder, or, if it is empty, switches the cache off. With a folder that can't be used
    programs are compiled as usual, and one line says so.
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
        with _one_warning(folder):
            yield
    finally:
        _update(before)


def _update(settings: Mapping[str, object]) -> None:
    import jax

    for name, value in settings.items():
        if getattr(jax.config, name) != value:
            jax.config.update(name, value)


@contextmanager
def _one_warning(folder: str | None) -> Iterator[None]:
    printed = False
    with warnings.catch_warnings():
        warnings.filterwarnings("always", _FAILED.pattern.partition("(")[0])
        show = warnings.showwarning

        def show_once(message: Warning | str, *rest: Any, **options: Any) -> None:
            nonlocal printed
            if not (failure := _FAILED.match(str(message))):
                show(message, *rest, **options)
            elif not printed:
                printed = True
                reason = failure[1].partition("\n")[0]
                print(
                    f"droplora: the compilation cache in {folder} can't be used ({reason}): what "
                    f"it lacks is compiled again. Repair or delete it; {VARIABLE} names another",
                    file=sys.stderr,
                    flush=True,
                )

        warnings.showwarning = show_once
        yield
