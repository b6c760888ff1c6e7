"""A cache of tokenised rows; its keys hold everything that the rows depend on."""

from __future__ import annotations

import hashlib
import json
import shutil
import tempfile
from collections.abc import Callable
from contextlib import ExitStack
from dataclasses import asdict, dataclass
from importlib.metadata import version
from pathlib import Path

from droplora_jax.core.errors import InputError
from droplora_jax.core.files import atomic_folder, cache_folder, locked
from droplora_jax.data import row_store
from droplora_jax.data.config import DataConfig
from droplora_jax.data.data_file import File
from droplora_jax.data.rows import Flat
from droplora_jax.data.templates.base import Tokenizer

# Options that do not change the rows of a file. All others do, and are part of the key.
OTHERS = ("train", "valid", "valid_fraction", "packing", "cache")


@dataclass(frozen=True)
class Cache:
    """A folder with one folder of rows for each file.

    Attributes:
      folder: what it holds may be deleted whenever no run uses it.
      tokenizer: the SHA-256 of the tokenizer's files.
    """

    folder: Path
    tokenizer: str

    @staticmethod
    def of(config: DataConfig, tokenizer: Tokenizer) -> Cache:
        folder = Path(config.cache).expanduser() if config.cache else cache_folder("rows")
        return Cache(folder, _tokenizer_digest(tokenizer))

    def rows(
        self,
        file: File,
        sha256: str,
        config: DataConfig,
        write: Callable[[row_store.FlatWriter], None],
    ) -> tuple[Flat, row_store.Info]:
        """The rows of a file: from the cache, or else written now by `write`.

        Raises:
          InputError: the folder can't be written, the disk is full, or the file changed while it
            was read.
        """
        folder = self.folder / self._key(file, sha256, config)
        if (kept := row_store.read(folder)) is not None:
            return kept
        try:
            with locked(folder):
                # Another process may have written the rows while this one waited for the lock.
                if (kept := row_store.read(folder)) is None:
                    self._clear(folder)
                    self._make(folder, file, sha256, write)
        except OSError as error:
            raise self._failed(error) from error
        rows = kept or row_store.read(folder)
        if rows is None:
            raise InputError(f"{folder}: what was just written there is not complete")
        return rows

    def _make(
        self, folder: Path, file: File, sha256: str, write: Callable[[row_store.FlatWriter], None]
    ) -> None:
        with atomic_folder(folder) as temporary:
            try:
                with ExitStack() as stack:
                    write(row_store.FlatWriter(temporary, stack))
            except OSError as error:  # from writing: reading raises InputError itself
                raise self._failed(error) from error
            if file.sha256() != sha256:
                raise InputError(f"{file.name}: was changed while it was read; run it again")

    def _key(self, file: File, sha256: str, config: DataConfig) -> str:
        settings = {k: v for k, v in asdict(config).items() if k not in OTHERS}
        facts = [file.suffix, sha256, self.tokenizer, settings, _code(), version("transformers")]
        return hashlib.sha256(json.dumps(facts).encode()).hexdigest()[:32]

    def _clear(self, folder: Path) -> None:
        """Remove incomplete rows, and what a process left that was killed while it wrote."""
        for left in [folder, *self.folder.glob(f".{folder.name}.*")]:
            if left.is_dir():
                shutil.rmtree(left)

    def _failed(self, error: OSError) -> InputError:
        return InputError(
            f"{self.folder}: tokenised rows could not be written ({error.strerror or error}); they "
            "take 5 bytes a token. Make room, or set data.cache to a folder elsewhere"
        )


def _code() -> str:
    """A hash of this room's code, so that rows that other code made are not used."""
    sources = sorted(Path(__file__).parent.rglob("*.py"))
    return hashlib.sha256(b"\0".join(source.read_bytes() for source in sources)).hexdigest()


def _tokenizer_digest(tokenizer: Tokenizer) -> str:
    digest = hashlib.sha256()
    with tempfile.TemporaryDirectory() as folder:
        tokenizer.save_pretrained(folder)
        for file in sorted(path for path in Path(folder).rglob("*") if path.is_file()):
            digest.update(file.name.encode() + b"\0" + file.read_bytes())
    return digest.hexdigest()
