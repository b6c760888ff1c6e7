"""The files that travel with a model beside its weights: of its base, and of its adapter."""

from __future__ import annotations

import shutil
import tempfile
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path

from droplora_jax.core.errors import InputError
from droplora_jax.core.files import check_links
from droplora_jax.hf.tokenizer import Loaded, add_special_tokens, loaded
from droplora_jax.models.config import Source

Files = Mapping[str, Path]  # by the name, relative to the folder, that each is to have

# A tokenizer's vocabulary; the folder that holds one of these files has a tokenizer of its own.
VOCABULARY = ("tokenizer.json", "*.model", "vocab.json", "vocab.txt", "tekken.json")
TEMPLATES = ("chat_template.*", "additional_chat_templates/*.jinja")
TOKENIZER = (
    *VOCABULARY,
    *TEMPLATES,
    "merges.txt",
    "added_tokens.json",
    "special_tokens_map.json",
    "tokenizer*",
)
CARRIED = (*TOKENIZER, "*.json", "*.jinja", "LICENSE*", "USE_POLICY*")
REPORT_FILE = "droplora_merge.json"  # what a merged folder is, and what was verified
# These describe the folder that they lie in: its tensors, an old merge, an adapter in it.
LEFT = ("*.index.json", REPORT_FILE, "adapter_config.json", "droplora_config.json")


def companions(base: Path, adapter: Path | None = None) -> Files:
    """The files that travel with a base, and with an adapter whose folder has a tokenizer.

    A vocabulary is one with its settings and its templates, so an adapter's takes the place of
    all files of the base's tokenizer; templates alone take the place of the base's templates.

    Raises:
      InputError: a file that is a link to another place.
    """
    files = _matching(base, CARRIED)
    for pattern in LEFT:
        for file in base.glob(pattern):
            files.pop(file.name, None)
    if adapter is None:
        return files
    brought = _matching(adapter, TOKENIZER)
    replaced: Sequence[str] = ()
    if _matching(adapter, VOCABULARY):
        replaced = TOKENIZER
    elif _matching(adapter, TEMPLATES):
        replaced = TEMPLATES
    for name in _matching(base, replaced):
        files.pop(name, None)
    return files | brought


def brings_tokenizer(adapter: Path) -> bool:
    """Whether an adapter's folder has files of a tokenizer."""
    return bool(_matching(adapter, TOKENIZER))


def has_vocabulary(folder: Path) -> bool:
    """Whether a folder has a tokenizer that can be loaded."""
    return bool(_matching(folder, VOCABULARY))


def tokenizer_files(adapter: Path) -> Files:
    """The files of the tokenizer in an adapter's folder."""
    return _matching(adapter, TOKENIZER)


def copy_files(files: Files, folder: Path) -> None:
    """Copy files under their names into a folder."""
    for name, file in files.items():
        target = folder / name
        target.parent.mkdir(parents=True, exist_ok=True)
        shutil.copyfile(file, target)


def tokenizer_of(source: Source) -> Loaded:
    """The tokenizer of a base: its own or an adapter's, with the tokens that were added.

    Raises:
      InputError: there is none, or it is broken.
    """
    folder, adapter = source.folder, source.tokenizer
    read = loaded(folder) if adapter is None else adapter_tokenizer(folder, adapter)
    if source.added is not None:
        add_special_tokens(read.tokenizer, source.added.texts)
    return read


@contextmanager
def tokenizer_folder(source: Source) -> Iterator[Path | None]:
    """A folder whose tokenizer takes the place of the one in the base's folder, if there is one.

    It may be gone after the block.
    """
    if source.added is None:
        yield source.tokenizer
        return
    with tempfile.TemporaryDirectory() as folder:
        tokenizer_of(source).tokenizer.save_pretrained(folder)
        yield Path(folder)


def adapter_tokenizer(base: Path, adapter: Path) -> Loaded:
    """The tokenizer of a base with an adapter that brings files of one.

    It is loaded as it would be from the merged folder.

    Raises:
      InputError: there is none, or it is broken.
    """
    with tempfile.TemporaryDirectory() as folder:
        wanted = {"config.json": base / "config.json", **companions(base, adapter)}
        copy_files(wanted, Path(folder))
        try:
            return loaded(Path(folder))
        except InputError as error:
            reason = str(error).replace(folder, str(adapter))
            raise InputError(
                f"{reason}; its files take the place of the base's: mend them, or take them away"
            ) from error


def _matching(folder: Path, patterns: Sequence[str]) -> dict[str, Path]:
    check_links(folder, patterns)
    return {
        str(file.relative_to(folder)): file
        for pattern in patterns
        for file in sorted(folder.glob(pattern))
        if file.is_file()
    }
