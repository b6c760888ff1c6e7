"""The compilation cache of the command line: where it is, and that it can only cost time."""

from __future__ import annotations

import os
import subprocess
import sys
import warnings
from pathlib import Path
from typing import NamedTuple

import jax
import pytest

from droplora_jax.core.compile_cache import VARIABLE, compile_cache

# Prints how many programs were compiled and how many were found, and a result.
PROGRAM = """
import jax, jax.numpy as jnp
from droplora_jax.core.compile_cache import compile_cache
counts = {"hits": 0, "misses": 0}
def count(event, **_):
    for name in counts:
        counts[name] += event == f"/jax/compilation_cache/cache_{name}"
jax.monitoring.register_event_listener(count)
with compile_cache():
    x = jax.jit(lambda x: jnp.tanh(x @ x.T).sum())(jnp.arange(12.0).reshape(3, 4) / 7)
print(counts["hits"], counts["misses"], float(x).hex())
"""


class Start(NamedTuple):
    """Programs that a process found and made, its result, and what it printed of trouble."""

    hits: int
    misses: int
    result: str
    errors: str


def start(home: Path, **variables: str) -> Start:
    """A process whose cache is in a folder."""
    unset = {name for name in os.environ if name.startswith("JAX_") and "CACHE" in name}
    environment = {name: value for name, value in os.environ.items() if name not in unset}
    environment |= {"XDG_CACHE_HOME": str(home), **variables}
    done = subprocess.run(
        [sys.executable, "-c", PROGRAM], env=environment, capture_output=True, text=True
    )
    assert done.returncode == 0, done.stderr
    hits, misses, result = done.stdout.split()
    return Start(int(hits), int(misses), result, done.stderr)


def kept(folder: Path) -> list[Path]:
    return sorted(folder.glob("*-cache"))


@pytest.fixture(scope="module")
def home(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A cache folder that one process has filled."""
    return tmp_path_factory.mktemp("home")


@pytest.fixture(scope="module")
def first(home: Path) -> Start:
    """The process that has filled it."""
    return start(home)


def test_a_second_start_compiles_nothing_and_gives_the_same_bits(home, first):
    assert (first.hits, first.errors) == (0, "")
    assert first.misses == len(kept(home / "droplora" / "compiled")) > 0
    assert start(home) == (first.misses, 0, first.result, "")


def test_the_variable_moves_it_and_set_to_nothing_switches_it_off(tmp_path):
    made = start(tmp_path / "home", **{VARIABLE: str(tmp_path / "other")})
    assert made[1] == len(kept(tmp_path / "other")) > 0
    assert start(tmp_path / "home", **{VARIABLE: ""}) == (0, 0, made[2], "")
    assert not (tmp_path / "home").exists()


def test_what_is_set_of_jax_s_own_stays(tmp_path):
    slow = {"JAX_PERSISTENT_CACHE_MIN_COMPILE_TIME_SECS": "1000"}
    assert start(tmp_path, **slow)[:2] == (0, 0)
    assert start(tmp_path, JAX_ENABLE_COMPILATION_CACHE="false")[:2] == (0, 0)
    assert not kept(tmp_path / "droplora" / "compiled")


def test_a_folder_that_can_not_be_made_is_told_of_in_one_line(tmp_path, first):
    (tmp_path / "file").write_text("x")
    second = start(tmp_path / "file")
    assert second[:3] == (0, 0, first.result)
    assert second.errors.count("\n") == 1
    assert f"droplora: the compilation cache in {tmp_path / 'file' / 'droplora'}" in second.errors
    assert "can't be used (NotADirectoryError" in second.errors


def test_broken_entries_are_told_of_in_one_line(home, first):
    # In place, since the folder's path is a part of the programs' keys.
    entries = {file: file.read_bytes() for file in kept(home / "droplora" / "compiled")}
    for file, content in entries.items():
        file.write_bytes(content[:50])
    second = start(home)
    for file, content in entries.items():
        file.write_bytes(content)
    assert (second.hits, second.result) == (0, first.result)
    assert first.misses > 1
    assert second.errors.count("\n") == 1
    assert "can't be used" in second.errors


def test_settings_and_warnings_are_put_back(monkeypatch):
    names = ("jax_compilation_cache_dir", "jax_persistent_cache_min_compile_time_secs")
    before = [getattr(jax.config, name) for name in names]
    with pytest.raises(KeyError), compile_cache():
        raise KeyError
    assert [getattr(jax.config, name) for name in names] == before
    with compile_cache(), pytest.warns(UserWarning, match="something else"):
        warnings.warn("something else", stacklevel=1)
