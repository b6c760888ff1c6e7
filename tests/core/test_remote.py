"""Buckets: what is fetched by several threads and processes at the same time."""

from __future__ import annotations

import subprocess
import sys
import threading
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import fsspec
import pytest

from droplora_jax.core import remote
from droplora_jax.core.errors import InputError

FILES = {f"{name}.json": f'{{"name": "{name}"}}' for name in ("config", "tokenizer", "index")}
PATTERNS = ("*.json", "*.model")
FETCHES = 20


@pytest.fixture(autouse=True)
def home(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A cache folder of the test alone."""
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "home"))
    return tmp_path / "home"


@pytest.fixture
def bucket(tmp_path: Path) -> str:
    """A folder behind a URL, which several processes can read."""
    folder = tmp_path / "bucket"
    folder.mkdir()
    for name, text in {**FILES, "model.safetensors": "large"}.items():
        (folder / name).write_text(text)
    return f"file://{folder}"


def contents(folder: Path) -> dict[str, str]:
    return {file.name: file.read_text() for file in folder.iterdir()}


def test_small_files_are_fetched_and_those_that_are_gone_removed(bucket):
    folder = remote.fetch(bucket, PATTERNS)
    assert contents(folder) == {**FILES, remote.URL_FILE: bucket}
    assert remote.tensors_url(folder) == bucket
    (folder / ".config.json.123.tmp").touch()  # of a process that was killed
    Path(bucket.removeprefix("file://"), "index.json").unlink()
    assert remote.fetch(f"{bucket}/", PATTERNS) == folder
    assert set(contents(folder)) == {"config.json", "tokenizer.json", remote.URL_FILE}


def test_files_of_a_folder_below_are_fetched_where_a_pattern_names_it(bucket):
    below = Path(bucket.removeprefix("file://"), "templates")
    below.mkdir()
    for name in ("tools.jinja", "notes.txt"):
        (below / name).write_text(name)
    folder = remote.fetch(bucket, (*PATTERNS, "templates/*.jinja"))
    assert [file.name for file in (folder / "templates").iterdir()] == ["tools.jinja"]
    (below / "tools.jinja").unlink()
    folder = remote.fetch(bucket, (*PATTERNS, "templates/*.jinja"))
    assert not list((folder / "templates").iterdir())


def test_a_folder_without_a_small_file_is_no_model(bucket):
    with pytest.raises(InputError, match="nothing of a model in it"):
        remote.fetch(bucket, ("*.bin",))


def test_threads_fetch_the_same_folder(monkeypatch):
    """Each of them sees all files after its fetch, while the others write them again."""
    fs = fsspec.filesystem("memory")
    for name, text in FILES.items():
        fs.pipe(f"/threads/{name}", text.encode())
    together = threading.Barrier(2)

    def fetches() -> list[dict[str, str]]:
        together.wait()
        return [contents_without_temporaries() for _ in range(FETCHES)]

    def contents_without_temporaries() -> dict[str, str]:
        folder = remote.fetch("memory://threads", PATTERNS)
        return {name: (folder / name).read_text() for name in FILES}

    with ThreadPoolExecutor(2) as pool:
        results = [pool.submit(fetches) for _ in range(2)]
    assert all(seen == FILES for result in results for seen in result.result())
    fs.rm("/threads", recursive=True)


PROCESS = f"""
import sys
from droplora_jax.core import remote
print("ready", flush=True)
sys.stdin.readline()
for _ in range({FETCHES}):
    folder = remote.fetch(sys.argv[1], {PATTERNS!r})
    assert {{name: (folder / name).read_text() for name in {FILES!r}}} == {FILES!r}
"""


def test_processes_fetch_the_same_folder(bucket):
    running = [
        subprocess.Popen(
            [sys.executable, "-c", PROCESS, bucket],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
            text=True,
        )
        for _ in range(2)
    ]
    for process in running:
        assert process.stdout.readline() == "ready\n"
    for process in running:
        process.stdin.write("\n")
        process.stdin.flush()
    errors = [process.communicate()[1] for process in running]
    assert [process.returncode for process in running] == [0, 0], errors
    assert contents(remote.fetch(bucket, PATTERNS)) == {**FILES, remote.URL_FILE: bucket}
