"""Folders on a bucket (`gs://`, `s3://`, and whatever else fsspec knows)."""

from __future__ import annotations

import hashlib
import os
from collections.abc import Sequence
from fnmatch import fnmatch
from pathlib import Path
from typing import Any

import fsspec

from droplora_jax.errors import InputError
from droplora_jax.files import write_file

URL_FILE = ".bucket"  # in a fetched folder: where its tensors are
PACKAGES = {"gs": "gcsfs", "gcs": "gcsfs", "s3": "s3fs", "az": "adlfs", "abfs": "adlfs"}


def is_url(path: str | Path) -> bool:
    return "://" in str(path)


def fetch(url: str, patterns: Sequence[str]) -> Path:
    """A local folder with the bucket's small files (those that match); tensors stay where they are.

    Raises:
      InputError: no such folder, no access, or a package that is missing.
    """
    url = url.rstrip("/")
    fs, root = _filesystem(url)
    try:
        found = {Path(path).name: path for path in fs.ls(root, detail=False)}
        small = {
            name: fs.cat_file(path)
            for name, path in found.items()
            if any(fnmatch(name, pattern) for pattern in patterns)
        }
    except Exception as error:  # each filesystem has its own
        raise InputError(f"{url}: can't be read ({_reason(error)})") from error
    if not small:
        raise InputError(f"{url}: nothing of a model in it")
    folder = _cache() / hashlib.sha256(url.encode()).hexdigest()[:32]
    folder.mkdir(parents=True, exist_ok=True)
    for name, content in small.items():
        write_file(folder / name, content)
    for old in folder.iterdir():
        if old.name not in small and old.name != URL_FILE:
            old.unlink()
    write_file(folder / URL_FILE, url)
    return folder


def tensors_url(folder: Path) -> str | None:
    """Where the tensors of a fetched folder are; None for a folder that has its own."""
    file = folder / URL_FILE
    return file.read_text() if file.exists() else None


def exists(url: str) -> bool:
    fs, path = _filesystem(url)
    return fs.exists(path)


class BucketFile:
    """A file on a bucket; every range is one request."""

    def __init__(self, url: str) -> None:
        self._url = url
        self._fs, self._path = _filesystem(url)
        try:
            self.size = int(self._fs.size(self._path))
        except FileNotFoundError as error:
            raise InputError(f"{url}: missing; upload it again") from error

    def range(self, start: int, stop: int) -> bytes:
        try:
            return self._fs.cat_file(self._path, start, stop)
        except Exception as error:  # each filesystem has its own
            raise InputError(f"{self._url}: can't be read ({_reason(error)})") from error

    def release(self, start: int, stop: int) -> None:
        pass


def _filesystem(url: str) -> tuple[Any, str]:
    try:
        return fsspec.core.url_to_fs(url)
    except ImportError as error:
        package = PACKAGES.get(url.split("://")[0], "the package that fsspec names")
        raise InputError(f"{url}: needs {package}: pip install {package}") from error
    except ValueError as error:
        raise InputError(f"{url}: {error}") from error


def _reason(error: Exception) -> str:
    text = str(error).strip()
    return f"{type(error).__name__}: {text.splitlines()[0]}" if text else type(error).__name__


def _cache() -> Path:
    home = os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache"
    return Path(home) / "droplora" / "buckets"
