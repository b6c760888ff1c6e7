"""One safetensors file: its header is checked, its tensors are read by rows and written in turn.

The format is a length (8 bytes, little-endian), a JSON header of that length, and the tensors, end
to end. The `safetensors` package does not read from a bucket and writes from memory only. It reads
slices of local files, but a file that it maps stays in memory as far as it was read: loading 1.48
GiB of weights took 1.50 GiB beside the arrays, and 0.02 GiB with `MappedFile.release`, in the same
time. Without a map (`backend="pread"`) the same load took 24 times as long.
"""

from __future__ import annotations

import copy
import json
import math
import mmap
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, BinaryIO, Protocol, runtime_checkable

import ml_dtypes
import numpy as np

from droplora_jax.core.errors import InputError

DTYPES = {
    "F32": np.dtype(np.float32),
    "F16": np.dtype(np.float16),
    "BF16": np.dtype(ml_dtypes.bfloat16),
}
# Bytes a value of the other dtypes that models are stored in.
OTHER_SIZES = {
    **dict.fromkeys(("F64", "I64", "U64"), 8),
    **dict.fromkeys(("I32", "U32"), 4),
    **dict.fromkeys(("I16", "U16"), 2),
    **dict.fromkeys(("I8", "U8", "BOOL", "F8_E4M3", "F8_E5M2", "F8_E8M0"), 1),
}
# The bits of the exponent: all of them set means infinity or NaN.
EXPONENTS = {
    "float32": (np.uint32, 0x7F800000),
    "float16": (np.uint16, 0x7C00),
    "bfloat16": (np.uint16, 0x7F80),
}
WRITTEN = 2**26  # bytes that are written, and read back, at a time
LONGEST_HEADER = 100_000_000


@runtime_checkable
class ByteRanges(Protocol):
    """A file, here or elsewhere, read by ranges."""

    @property
    def size(self) -> int: ...

    def range(self, start: int, stop: int) -> bytes | memoryview:
        """The bytes from `start` to `stop`, as a buffer."""
        ...

    def release(self, start: int, stop: int) -> None:
        """The range is not needed any more."""
        ...


class MappedFile:
    """A local file, mapped: pages load on access; `release` drops them from memory."""

    def __init__(self, file: Path) -> None:
        with file.open("rb") as opened:
            self.size = opened.seek(0, 2)
            self._map = mmap.mmap(opened.fileno(), 0, access=mmap.ACCESS_READ) if self.size else b""

    def range(self, start: int, stop: int) -> memoryview:
        return memoryview(self._map)[start:stop]

    def release(self, start: int, stop: int) -> None:
        page = mmap.PAGESIZE
        start, stop = -(-start // page) * page, stop // page * page
        if isinstance(self._map, mmap.mmap) and stop > start:
            self._map.madvise(mmap.MADV_DONTNEED, start, stop - start)


@dataclass(frozen=True)
class Entry:
    """Where a tensor lies in its file, in bytes from the file's beginning."""

    stored: str
    shape: tuple[int, ...]
    start: int
    stop: int


class TensorFile:
    """The tensors of one file, in the order that they lie in it.

    Raises:
      InputError: not a safetensors file, or one whose header and length do not agree.
    """

    def __init__(self, content: ByteRanges, name: object) -> None:
        self.name = str(name)
        self._content = content
        self.entries = _read_header(content, self.name)

    def with_names(self, names: Mapping[str, str]) -> TensorFile:
        """The same file with other names for its tensors."""
        renamed = copy.copy(self)
        renamed.entries = {names[tensor]: entry for tensor, entry in self.entries.items()}
        return renamed

    def dtype(self, tensor: str) -> np.dtype:
        stored = self.entries[tensor].stored
        if stored not in DTYPES:
            raise InputError(
                f"{self.name}: {tensor} is stored as {stored}; supported: {', '.join(DTYPES)}"
            )
        return DTYPES[stored]

    def rows(self, tensor: str, first: int, last: int) -> np.ndarray:
        """Rows `first` to `last` as [last - first, ...]; good until they are released."""
        entry = self.entries[tensor]
        start, stop = _range(entry, first, last)
        flat = np.frombuffer(self._content.range(start, stop), self.dtype(tensor))
        return flat.reshape(last - first, *entry.shape[1:])

    def release(self, tensor: str, first: int, last: int) -> None:
        self._content.release(*_range(self.entries[tensor], first, last))


def _range(entry: Entry, first: int, last: int) -> tuple[int, int]:
    row = (entry.stop - entry.start) // entry.shape[0] if entry.shape[0] else 0
    return entry.start + first * row, entry.start + last * row


def _read_header(content: ByteRanges, name: str) -> dict[str, Entry]:
    def broken(why: str) -> InputError:
        return InputError(f"{name}: broken or cut short ({why}); download it again")

    if content.size < 8:
        raise broken(f"{content.size} bytes")
    length = int.from_bytes(content.range(0, 8), "little")
    begin = 8 + length
    if length > LONGEST_HEADER or begin > content.size:
        raise broken(f"says that its header has {length} bytes, of {content.size} in the file")
    try:
        text = bytes(content.range(8, begin)).decode("utf-8")
        header = json.loads(text, object_pairs_hook=_unique)
        header.pop("__metadata__", None)
        entries = {tensor: _entry(value, begin) for tensor, value in header.items()}
    except (ValueError, KeyError, TypeError, AttributeError) as error:
        raise broken(f"its header is not one of safetensors: {error}") from error
    ordered = dict(sorted(entries.items(), key=lambda item: (item[1].start, item[1].stop)))
    end = begin
    for tensor, entry in ordered.items():
        if entry.start != end:
            raise broken(f"{tensor} begins at byte {entry.start}, where {end} is expected")
        size = DTYPES[entry.stored].itemsize if entry.stored in DTYPES else 0
        size = size or OTHER_SIZES.get(entry.stored, 0)
        if size and entry.stop - entry.start != size * math.prod(entry.shape):
            raise broken(
                f"{tensor} has {entry.stop - entry.start} bytes, which is not "
                f"{entry.stored} of shape {list(entry.shape)}"
            )
        end = entry.stop
    if end != content.size:
        raise broken(f"its tensors end at byte {end}, the file at {content.size}")
    return ordered


def _unique(pairs: list[tuple[str, object]]) -> dict[str, object]:
    value = dict(pairs)
    if len(value) != len(pairs):
        names = [name for name, _ in pairs]
        twice = next(name for name in names if names.count(name) > 1)
        raise ValueError(f"{twice!r} is in it twice")
    return value


def _entry(value: Mapping[str, Any], begin: int) -> Entry:
    shape, (start, stop) = tuple(value["shape"]), value["data_offsets"]
    if not all(isinstance(size, int) and size >= 0 for size in (*shape, start, stop)):
        raise ValueError(f"shape {list(shape)} at {start} to {stop}")
    return Entry(value["dtype"], shape, begin + start, begin + stop)


class TensorWriter:
    """A safetensors file that is written tensor by tensor, each of which is read back at once.

        with TensorWriter(file, entries) as writer:
            for name in entries:
                writer.write(name, tensor_of(name))

    Args:
      entries: dtype and shape of every tensor, by name, in the order in which they are written.

    Raises:
      OSError: no space, or bytes that are not read back as they were written.
      ValueError: another tensor than the next of `entries`, or the end before the last.
    """

    def __init__(self, file: Path, entries: Mapping[str, tuple[np.dtype, tuple[int, ...]]]) -> None:
        self._entries, self._remaining = entries, list(entries)[::-1]
        self._out = file.open("w+b", buffering=0)
        text = _header(entries)
        _write(self._out, len(text).to_bytes(8, "little") + text, file.name)

    def write(self, name: str, tensor: np.ndarray) -> None:
        """Write the next tensor."""
        expected = self._remaining.pop() if self._remaining else None
        dtype, shape = self._entries.get(name, (None, None))
        if name != expected or tensor.dtype != dtype or tensor.shape != shape:
            raise ValueError(f"{name}: {tensor.dtype}{tensor.shape} for {expected}: {dtype}{shape}")
        content = np.ascontiguousarray(tensor).reshape(-1).view(np.uint8)
        for at in range(0, len(content), WRITTEN):
            _write(self._out, content[at : at + WRITTEN].data, name)

    def __enter__(self) -> TensorWriter:
        return self

    def __exit__(self, kind: type[BaseException] | None, *_: object) -> None:
        self._out.close()
        if kind is None and self._remaining:
            raise ValueError(f"{self._remaining[-1]} was not written")


def _header(entries: Mapping[str, tuple[np.dtype, tuple[int, ...]]]) -> bytes:
    stored = {dtype: name for name, dtype in DTYPES.items()}
    header: dict[str, object] = {"__metadata__": {"format": "pt"}}
    end = 0
    for name, (dtype, shape) in entries.items():
        start, end = end, end + dtype.itemsize * math.prod(shape)
        header[name] = {"dtype": stored[dtype], "shape": list(shape), "data_offsets": [start, end]}
    text = json.dumps(header, separators=(",", ":")).encode()
    return text + b" " * (-len(text) % 8)  # readers may want the tensors aligned


def _write(out: BinaryIO, content: bytes | memoryview, name: str) -> None:
    begin, at = out.tell(), 0
    while at < len(content):  # a raw write may take a part only
        at += out.write(content[at:])
    out.seek(begin)
    back = np.frombuffer(out.read(len(content)), np.uint8)
    if not np.array_equal(back, np.frombuffer(content, np.uint8)):
        raise OSError(f"{name} was not read back as it was written")


def is_finite(x: np.ndarray) -> bool:
    """Whether a tensor of one of `DTYPES` holds neither NaN nor infinity."""
    unsigned, exponent = EXPONENTS[x.dtype.name]
    flat = x.reshape(-1).view(unsigned)
    blocks = (flat[at : at + 2**20] for at in range(0, flat.size, 2**20))  # in a core's cache
    return not any(((block & exponent) == exponent).any() for block in blocks)
