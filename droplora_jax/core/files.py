"""JSON files, and files and folders that appear complete or not at all."""

from __future__ import annotations

import json
import os
import shutil
import tempfile
import uuid
from collections.abc import Collection, Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any, BinaryIO

from filelock import FileLock
from safetensors import SafetensorError

from droplora_jax.core.errors import InputError


def read_json(path: Path) -> dict[str, Any]:
    """The JSON object in a file.

    Raises:
      InputError: the file is missing, is not JSON, or holds another value.
    """
    try:
        value = json.loads(path.read_text(encoding="utf-8"))
    except FileNotFoundError as error:
        raise InputError(f"{path}: missing") from error
    except (UnicodeDecodeError, json.JSONDecodeError) as error:
        raise InputError(f"{path}: not valid JSON ({error})") from error
    if not isinstance(value, dict):
        raise InputError(f"{path}: holds {type(value).__name__}, not a JSON object")
    return value


def write_json(path: Path, value: Mapping[str, Any]) -> None:
    path.write_text(json.dumps(value, indent=2) + "\n", encoding="utf-8")


def check_free(folder: Path, *, ignore: Collection[Path] = ()) -> None:
    """Raise InputError if `folder` exists and holds anything but the files `ignore`."""
    if folder.exists() and (not folder.is_dir() or set(folder.iterdir()) - set(ignore)):
        raise InputError(
            f"{folder}: exists and is not empty; nothing is overwritten. Name another folder, "
            "or move that one away"
        )


def check_absent(file: Path) -> None:
    """Raise InputError if `file` exists."""
    if file.exists():
        raise InputError(f"{file}: exists; nothing is overwritten. Name another file")


def check_links(folder: Path, patterns: Sequence[str]) -> None:
    """Raise InputError for a matching file that is a link to a place outside `folder`.

    Links into the `blobs` of huggingface_hub's cache are allowed: its snapshots consist of them,
    and some of its versions have put them into folders that a model was downloaded to.
    """
    for file in sorted({file for pattern in patterns for file in folder.glob(pattern)}):
        target = file.resolve()
        if file.is_symlink() and not (target.is_relative_to(folder) or _is_blob(target)):
            raise InputError(
                f"{file}: a link to {target}, outside its folder; it is not followed. Copy the "
                "file into the folder"
            )


def _is_blob(path: Path) -> bool:
    """Whether a file lies where huggingface_hub's cache keeps what it has downloaded."""
    return path.parent.name == "blobs" and path.parent.parent.name.startswith("models--")


def cache_folder(name: str) -> Path:
    """A folder of the user's cache, which may not exist yet; its contents can be made again."""
    home = os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache"
    return Path(home) / "droplora" / name


def write_file(path: Path, content: str | bytes) -> None:
    """Write a file that appears complete or not at all, in place of an old one."""
    with new_file(path) as file:
        file.write(content.encode() if isinstance(content, str) else content)


@contextmanager
def new_file(path: Path) -> Iterator[BinaryIO]:
    """A file to write that takes its name when the block ends well; else nothing remains.

    Several threads and processes may write the same file: each has a temporary name of its own,
    and the last one that ends stays.
    """
    temporary = path.with_name(f".{path.name}.{uuid.uuid4().hex}.tmp")
    try:
        with temporary.open("xb") as file:
            yield file
            file.flush()
            os.fsync(file.fileno())
        temporary.replace(path)
    finally:
        temporary.unlink(missing_ok=True)


def temporary_files(path: Path) -> set[Path]:
    """What processes that were killed while they wrote `path` have left beside it."""
    return set(path.parent.glob(f".{path.name}*.tmp"))


@contextmanager
def locked(path: Path) -> Iterator[None]:
    """A lock for `path` between threads and processes; it is released when its holder dies."""
    path.parent.mkdir(parents=True, exist_ok=True)
    with FileLock(path.with_name(f".{path.name}.lock")):
        yield


@contextmanager
def atomic_folder(folder: Path, *, replace: bool = False) -> Iterator[Path]:
    """A temporary folder beside `folder` that takes its name when the block ends well.

    After an error nothing remains. `folder` may exist if it is empty, or with `replace`.
    """
    if not replace:
        check_free(folder)
    temporary = None
    try:
        folder.parent.mkdir(parents=True, exist_ok=True)
        temporary = Path(tempfile.mkdtemp(prefix=f".{folder.name}.", dir=folder.parent))
        yield temporary
        _finish(temporary)
        if replace and folder.exists():
            old = temporary.with_name(temporary.name + ".old")
            folder.rename(old)
            temporary.rename(folder)
            shutil.rmtree(old)
        else:
            temporary.rename(folder)
    except BaseException as error:
        if temporary is not None:
            shutil.rmtree(temporary, ignore_errors=True)
        if isinstance(error, OSError | SafetensorError):
            raise InputError(
                f"{folder}: could not be written ({error}); nothing of it was kept"
            ) from error
        raise


def _finish(folder: Path) -> None:
    """Set the usual permissions, and flush the files to disk before the rename."""
    mask = os.umask(0)
    os.umask(mask)
    folder.chmod(0o777 & ~mask)
    for path in folder.rglob("*"):
        if path.is_dir():
            path.chmod(0o777 & ~mask)
            continue
        path.chmod(0o666 & ~mask)
        with path.open("rb") as file:
            os.fsync(file.fileno())


Row = dict[str, Any]


def read_jsonl(file: Path) -> list[Row]:
    """The objects in a file of JSON lines that this package wrote; none if there is no file.

    The last line is left out if a crash cut it short.
    """
    rows: list[Row] = []
    if file.exists():
        for line in file.read_text(encoding="utf-8").splitlines():
            try:
                rows.append(json.loads(line))
            except json.JSONDecodeError:
                break
    return rows
