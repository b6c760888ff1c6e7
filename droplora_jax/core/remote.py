"""Files and folders on a bucket (`gs://`, `s3://`, and whatever else fsspec knows)."""

from __future__ import annotations

import hashlib
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from fnmatch import fnmatch
from pathlib import Path

import fsspec
from fsspec import AbstractFileSystem

from droplora_jax.core.errors import InputError, first_line
from droplora_jax.core.files import cache_folder, locked, new_file, write_file

URL_FILE = ".bucket"  # the file of a fetched folder that holds the URL of its tensors
PACKAGES = {"gs": "gcsfs", "gcs": "gcsfs", "s3": "s3fs", "az": "adlfs", "abfs": "adlfs"}
SIGN_IN = {
    "gs": "gcloud auth application-default login",
    "gcs": "gcloud auth application-default login",
    "s3": "aws configure",
    "hf": "hf auth login",
}


def is_url(path: str | Path) -> bool:
    return "://" in str(path)


def fetch(url: str, patterns: Sequence[str]) -> Path:
    """A local folder with the bucket's small files (those that match); tensors stay where they are.

    Threads and processes that fetch the same folder do so one after the other.

    Raises:
      InputError: no such folder, no access, or a package that is missing.
    """
    url = url.rstrip("/")
    folder = _folder_of(url)
    with locked(folder):
        files = _small_files(url, patterns) | {URL_FILE: url.encode()}
        folder.mkdir(exist_ok=True)
        for name, content in files.items():
            (folder / name).parent.mkdir(exist_ok=True)
            write_file(folder / name, content)
        for old in folder.rglob("*"):
            if old.is_file() and str(old.relative_to(folder)) not in files:
                old.unlink()
    return folder


def _small_files(url: str, patterns: Sequence[str]) -> dict[str, bytes]:
    """The contents of the files in a folder whose names match a pattern."""
    fs, root = _filesystem(url)
    with _reading(url):
        fs.ls(root, detail=False)  # an error where there is no such folder: `find` has none
        below = (str(path) for path in fs.find(root, maxdepth=2))
        paths = {path.removeprefix(root).lstrip("/"): path for path in below}
        contents = {
            name: fs.cat_file(path)
            for name, path in paths.items()
            if any(_matches(name, pattern) for pattern in patterns)
        }
    if not contents:
        raise InputError(f"{url}: nothing of a model in it")
    return contents


def _matches(name: str, pattern: str) -> bool:
    """Whether a file's name, relative to its folder, matches a pattern of as many parts."""
    return name.count("/") == pattern.count("/") and fnmatch(name, pattern)


def tensors_url(folder: Path) -> str | None:
    """The URL of a fetched folder's tensors; None for a folder that has its own."""
    file = folder / URL_FILE
    return file.read_text() if file.exists() else None


def exists(url: str) -> bool:
    fs, path = _filesystem(url)
    return fs.exists(path)


def fetch_file(url: str) -> Path:
    """A local copy of a file, fetched again when the file has changed.

    Raises:
      InputError: no such file, no access, a package that is missing, or a disk that is full.
    """
    fs, path = _filesystem(url)
    with _reading(url):
        if not fs.isfile(path):
            raise InputError(f"{url}: no such file on the bucket")
        version = str(fs.ukey(path))
    copy = _folder_of(f"{url} {version}") / Path(path).name
    try:
        with locked(copy):
            if not copy.exists():
                with new_file(copy) as local:
                    for part in _parts(url, fs, path):
                        local.write(part)
    except OSError as error:
        raise InputError(f"{copy}: the copy of {url} can't be written ({error})") from error
    return copy


def _parts(url: str, fs: AbstractFileSystem, path: str) -> Iterator[bytes]:
    with _reading(url), fs.open(path, "rb") as remote:
        while part := remote.read(2**22):
            yield part


def matching(url: str) -> list[str]:
    """The URLs of the files that match a glob, in order."""
    fs, pattern = _filesystem(url)
    with _reading(url):
        return [fs.unstrip_protocol(path) for path in sorted(fs.glob(pattern)) if fs.isfile(path)]


def names_in(url: str) -> list[str] | None:
    """The names of the files in a folder; None if the URL is not a folder."""
    fs, path = _filesystem(url)
    with _reading(url):
        if not fs.isdir(path):
            return None
        return [Path(file["name"]).name for file in fs.ls(path) if file["type"] == "file"]


class BucketFile:
    """A file on a bucket, read by ranges; each range is one request."""

    def __init__(self, url: str) -> None:
        self._url = url
        self._fs, self._path = _filesystem(url)
        try:
            self.size = int(self._fs.size(self._path))
        except FileNotFoundError as error:
            raise InputError(f"{url}: missing; upload it again") from error

    def range(self, start: int, stop: int) -> bytes:
        with _reading(self._url):
            return self._fs.cat_file(self._path, start, stop)

    def release(self, start: int, stop: int) -> None:
        pass


def _filesystem(url: str) -> tuple[AbstractFileSystem, str]:
    try:
        return fsspec.core.url_to_fs(url)
    except ImportError as error:
        package = PACKAGES.get(url.split("://")[0], "the package that fsspec names")
        raise InputError(f"{url}: needs {package}: pip install {package}") from error
    except ValueError as error:
        raise InputError(f"{url}: {error}") from error


@contextmanager
def _reading(url: str) -> Iterator[None]:
    """Turns whatever error a filesystem raises in the block into an InputError."""
    try:
        yield
    except InputError:
        raise
    except Exception as error:
        sign_in = SIGN_IN.get(url.split("://")[0])
        hint = f". If you have access, sign in: {sign_in}" if sign_in else ""
        raise InputError(f"{url}: can't be read ({reason(error)}){hint}") from error


def reason(error: Exception) -> str:
    """The type of an error and the first line of its text."""
    kind, line = type(error).__name__, first_line(error)
    return kind if line == kind else f"{kind}: {line}"


def _folder_of(url: str) -> Path:
    return cache_folder("buckets") / hashlib.sha256(url.encode()).hexdigest()[:32]
