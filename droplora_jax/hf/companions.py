"""The files that travel with a model beside its weights: of its base, and of its adapter."""

from __future__ import annotations

import shutil
import tempfile
from collections.abc import Mapping, Sequence
from pathlib import Path

from droplora_jax.core.errors import InputError
from droplora_jax.core.files import check_links
from droplora_jax.hf.tokenizer import Loaded, loaded

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
