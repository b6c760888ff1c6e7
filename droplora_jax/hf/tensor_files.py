"""The tensors of a model, spread over safetensors files, as one table read slice by slice."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping
from pathlib import Path
from types import MappingProxyType

import numpy as np
from numpy.typing import DTypeLike

from droplora_jax.core import remote
from droplora_jax.core.errors import InputError
from droplora_jax.core.files import read_json
from droplora_jax.hf.mean_rows import MeanRows
from droplora_jax.hf.safetensors_file import MappedFile, TensorFile, is_finite
from droplora_jax.models.config import Source

INDEX_FILE = "model.safetensors.index.json"
SINGLE_FILE = "model.safetensors"
PREFIX = "model."  # of the tensors of a decoder, within a model with a head
BARE = "embed_tokens.weight"  # the embedding of a decoder that was saved by itself

BLOCK_BYTES = 2**21  # read, checked, cast and turned while it is in a core's cache
TURNED = 256  # columns that are turned at a time

Each = Callable[[Callable[[int], None], Iterable[int]], Iterable[None]]


def open_folder(folder: Path) -> TensorFiles:
    """The tensors of `model.safetensors`, or of the shards that its index lists.

    An index without its shards beside `model.safetensors` is a leftover of an earlier save, and
    transformers passes over it too. A decoder that was saved without its head lacks the prefix
    `model.`; its tensors have it here.

    Raises:
      InputError: no safetensors (pickled weights are not read), a broken index, one that does not
        say what its shards hold, or the weights of two models.
    """
    index, single = folder / INDEX_FILE, _beside(folder, SINGLE_FILE)
    if _exists(single):
        if index.exists():
            _check_leftover(folder, index)
        return _with_prefix(open_file(single))
    if index.exists():
        return _with_prefix(_of_index(folder, index))
    if pickled := sorted(path.name for path in folder.glob("*.bin")):
        raise InputError(
            f"{folder}: only pickled weights ({', '.join(pickled[:3])}), which can run code when "
            "loaded. Convert them once with transformers: "
            "AutoModelForCausalLM.from_pretrained(DIR).save_pretrained(NEW_DIR)"
        )
    raise InputError(f"{folder}: neither {SINGLE_FILE} nor {INDEX_FILE} in it")


def has_weights(folder: Path) -> bool:
    """Whether a folder has safetensors of a model."""
    return (folder / INDEX_FILE).exists() or _exists(_beside(folder, SINGLE_FILE))


def open_source(source: Source) -> TensorFiles:
    """The tensors of a model, also those that do not come from its folder.

    Tables that an adapter brings have rows for tokens that were added to the base already.

    Raises:
      InputError: see `open_folder`; or a file that lacks one of `source.others`.
    """
    tensors = open_folder(source.folder)
    files = {other.file for other in source.others if other.file is not None}
    opened = {file: open_file(file) for file in sorted(files)}
    own: dict[str, tuple[TensorFiles, str]] = {}
    brought: dict[str, tuple[TensorFiles, str]] = {}
    for other in source.others:
        holder = tensors if other.file is None else opened[other.file]
        if other.stored_as not in holder.files:
            raise InputError(f"{other.file or source.folder}: lacks {other.stored_as}")
        (own if other.file is None else brought)[other.name] = (holder, other.stored_as)
    tensors = tensors.with_others(own)
    if source.added is not None:
        present = [name for name in source.added.tables if name in tensors.files]
        rows = (source.added.first, source.added.stop)
        tensors = tensors.with_others({name: tensors.with_mean(name, *rows) for name in present})
    return tensors.with_others(brought)


def open_file(file: Path | str) -> TensorFiles:
    """The tensors of one safetensors file, a path or a bucket's URL."""
    opened = _open(file)
    return TensorFiles(dict.fromkeys(opened.entries, file), {file: opened})


def _weight_map(index: Path) -> dict[str, str]:
    weight_map = read_json(index).get("weight_map")
    if not isinstance(weight_map, dict):
        raise InputError(f"{index}: no 'weight_map' in it; download the index again")
    for file in weight_map.values():
        if not isinstance(file, str) or Path(file).name != file:
            raise InputError(f"{index}: names the file {file!r}, which is not one of its folder")
    return weight_map


def _of_index(folder: Path, index: Path) -> TensorFiles:
    weight_map = _weight_map(index)
    opened = {file: _open(_beside(folder, file)) for file in sorted(set(weight_map.values()))}
    for file, shard in opened.items():
        for tensor in shard.entries:
            if (listed := weight_map.get(tensor)) != file:
                where = f"in {listed} by" if listed else "not listed in"
                raise InputError(
                    f"{shard.name}: holds {tensor}, which is {where} {index.name}: a tensor must "
                    "be in one shard, the one that the index names; download both again"
                )
    of_paths = {_beside(folder, file): shard for file, shard in opened.items()}
    return TensorFiles(
        {tensor: _beside(folder, file) for tensor, file in weight_map.items()}, of_paths
    )


def _check_leftover(folder: Path, index: Path) -> None:
    """Raise InputError if shards of an index lie beside `model.safetensors`."""
    shards = sorted(_shards_of(index) - {SINGLE_FILE})
    if present := [shard for shard in shards if _exists(_beside(folder, shard))]:
        newer = ""
        if not remote.tensors_url(folder):
            times = {name: (folder / name).stat().st_mtime for name in (SINGLE_FILE, *present)}
            newest = max(times, key=lambda name: times[name])
            newer = f" ({newest} is the newest)"
        raise InputError(
            f"{folder}: holds {SINGLE_FILE} and the shards of {INDEX_FILE}, such as {present[0]}: "
            f"two models{newer}. transformers reads {SINGLE_FILE}; move the files of the other "
            "away"
        )


def _shards_of(index: Path) -> set[str]:
    """The files that an index names.

    Raises:
      InputError: no table in it, or the name of a file that is not one of its folder.
    """
    return set(_weight_map(index).values())


def _with_prefix(tensors: TensorFiles) -> TensorFiles:
    """The tensors under the names that they have in a whole model."""
    if BARE not in tensors.files:
        return tensors
    return tensors.with_names(
        {name: name if name.startswith("lm_head.") else PREFIX + name for name in tensors.files}
    )


def _exists(file: Path | str) -> bool:
    return remote.exists(file) if isinstance(file, str) else file.exists()


def _beside(folder: Path, file: str) -> Path | str:
    """A file with tensors: in the folder, or on the bucket that the folder was fetched from."""
    url = remote.tensors_url(folder)
    return f"{url}/{file}" if url else folder / file


def _open(file: Path | str) -> TensorFile:
    if isinstance(file, str):
        return TensorFile(remote.BucketFile(file), file)
    try:
        return TensorFile(MappedFile(file), file)
    except FileNotFoundError as error:
        raise InputError(f"{file}: missing; download it again") from error


class TensorFiles:
    """Tensors by name, each in a file of its own or with others, read slice by slice.

    Attributes:
      files: where each tensor is stored, by its name.
    """

    def __init__(
        self,
        files: Mapping[str, Path | str],
        opened: Mapping[Path | str, TensorFile],
        others: Mapping[str, tuple[TensorFiles, str]] = MappingProxyType({}),
    ) -> None:
        self._opened, self._others = opened, others
        elsewhere = {name: holder.files[stored] for name, (holder, stored) in others.items()}
        self.files: dict[str, Path | str] = {**files, **elsewhere}

    def with_names(self, names: Mapping[str, str]) -> TensorFiles:
        """The same tensors in the same files, each under the other name that it is given."""
        files = {names[name]: file for name, file in self.files.items()}
        opened = {file: shard.with_names(names) for file, shard in self._opened.items()}
        return TensorFiles(files, opened)

    def with_others(self, others: Mapping[str, tuple[TensorFiles, str]]) -> TensorFiles:
        """With further tensors, or others in place of those of the same name.

        Args:
          others: for each name, the files that hold the tensor, and its name there.
        """
        own = {name: file for name, file in self.files.items() if name not in self._others}
        return TensorFiles(own, self._opened, {**self._others, **others})

    def with_mean(self, name: str, first: int, stop: int) -> tuple[TensorFiles, str]:
        """A table whose rows `first` to `stop` are the mean of those before; see `with_others`."""
        table = MeanRows(*self._place(name), first, stop)
        file = self.files[name]
        return TensorFiles(dict.fromkeys(table.entries, file), {file: table}), table.tensor

    def renamed(self, names: Mapping[str, str]) -> TensorFiles:
        """The tensors of these names, each under the other name that it is given."""
        return TensorFiles({}, {}, {new: (self, stored) for stored, new in names.items()})

    def shards(self) -> dict[str, list[str]]:
        """The files' names, each with its tensors in the order that they lie in it.

        A tensor from elsewhere is where the one of its name was, or at the end of the last file.
        """
        shards = {Path(file).name: list(opened.entries) for file, opened in self._opened.items()}
        present = {name for names in shards.values() for name in names}
        if further := [name for name in self._others if name not in present]:
            last = max(shards)
            shards[last] += further
        return shards

    def shape(self, name: str) -> tuple[int, ...]:
        file, stored = self._place(name)
        return file.entries[stored].shape

    def dtype(self, name: str) -> np.dtype:
        file, stored = self._place(name)
        return file.dtype(stored)

    def read(
        self,
        name: str,
        index: tuple[slice, ...] = (),
        *,
        dtype: DTypeLike | None = None,
        transposed: bool = False,
        each: Each = map,
    ) -> np.ndarray:
        """One slice of a tensor as an array of its own; see `read_into`."""
        lengths = [len(range(*s.indices(n))) for s, n in zip(index, self.shape(name), strict=False)]
        shape = (*lengths, *self.shape(name)[len(index) :])
        out = np.empty(shape[::-1] if transposed else shape, dtype or self.dtype(name))
        self.read_into(out, name, index, transposed=transposed, each=each)
        return out

    def read_into(
        self,
        out: np.ndarray,
        name: str,
        index: tuple[slice, ...] = (),
        *,
        transposed: bool = False,
        each: Each = map,
    ) -> None:
        """Fill `out` with one slice of a tensor, in the dtype of `out`; nothing else is read.

        Args:
          index: of the stored tensor.
          transposed: `out` is [columns, rows] of the stored slice.
          each: a `map`, such as that of a pool of threads.

        Raises:
          InputError: a value that is not finite.
        """
        (file, stored), shape = self._place(name), self.shape(name)
        rows = range(*(index[0] if index else slice(None)).indices(shape[0]))
        stored_row = self.dtype(name).itemsize * int(np.prod(shape[1:], dtype=np.int64))
        step = max(1, BLOCK_BYTES // max(1, stored_row))

        def copy(first: int) -> None:
            last = min(first + step, rows.stop)
            block = np.array(file.rows(stored, first, last)[(slice(None), *index[1:])])
            if not is_finite(block):
                raise InputError(
                    f"{self.files[name]}: {name} holds NaN or infinity; download or convert it "
                    "again"
                )
            with np.errstate(over="ignore"):
                block = block.astype(out.dtype, copy=False)
            at = slice(first - rows.start, last - rows.start)
            if transposed:
                _turn(block, out[:, at])
            else:
                out[at] = block
            file.release(stored, first, last)

        for _ in each(copy, range(rows.start, rows.stop, step)):
            pass

    def _place(self, name: str) -> tuple[TensorFile, str]:
        """The file that holds a tensor, and the tensor's name in it."""
        if name in self._others:
            holder, stored = self._others[name]
            return holder._place(stored)
        opened = self._opened[self.files[name]]
        if name not in opened.entries:
            raise InputError(f"{opened.name}: does not hold {name}; download it again")
        return opened, name


def turned(x: np.ndarray, each: Each = map) -> np.ndarray:
    """A contiguous copy of `x.T`."""
    out = np.empty(x.shape[::-1], x.dtype)
    step = max(1, BLOCK_BYTES // max(1, x.nbytes // max(1, len(x))))

    def turn(first: int) -> None:
        _turn(x[first : first + step], out[:, first : first + step])

    for _ in each(turn, range(0, len(x), step)):
        pass
    return out


def _turn(block: np.ndarray, out: np.ndarray) -> None:
    for column in range(0, block.shape[1], TURNED):
        out[column : column + TURNED] = block[:, column : column + TURNED].T
