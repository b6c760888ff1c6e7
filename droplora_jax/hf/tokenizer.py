"""The tokenizer of a model's folder."""

from __future__ import annotations

import logging
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from importlib.util import find_spec
from pathlib import Path
from typing import Any, NamedTuple

from droplora_jax.core.errors import InputError, first_line
from droplora_jax.core.files import read_json
from droplora_jax.data.templates.base import Tokenizer

# Classes that add nothing to what `tokenizer.json` says.
GENERIC = ("PreTrainedTokenizerFast", "TokenizersBackend")
FILE, CONFIG_FILE, SENTENCEPIECE_FILE = "tokenizer.json", "tokenizer_config.json", "tokenizer.model"
# Spaces, line ends, digits, punctuation and other alphabets: where tokenizers differ.
SAMPLE = "def f(x):\n    return x  # It's 12,345!\n\n\tnaïve 日本語 🙂"


class Loaded(NamedTuple):
    """A tokenizer, and whether it is the one that transformers makes of its folder by itself."""

    tokenizer: Tokenizer
    is_transformers: bool


def load_tokenizer(folder: Path) -> Tokenizer:
    """The Hugging Face tokenizer in a folder; see `loaded`."""
    return loaded(folder).tokenizer


def loaded(folder: Path) -> Loaded:
    """The Hugging Face tokenizer in a folder.

    Where the folder has a `tokenizer.json`, its ids are those that this file gives. Python code in
    the folder is never run.

    Raises:
      InputError: there is none, it is broken, or it needs Python code or a package that is missing.
    """
    with _no_advice():
        import transformers
    _check_readable(folder, transformers)
    try:
        if _is_generic(folder):
            # What AutoTokenizer comes to, but it imports PyTorch on the way where it finds it.
            return Loaded(transformers.PreTrainedTokenizerFast.from_pretrained(folder), True)
        tokenizer = transformers.AutoTokenizer.from_pretrained(
            folder, local_files_only=True, trust_remote_code=False
        )
        if _is_of_file(tokenizer, folder / FILE):
            return Loaded(tokenizer, True)
        # The class that the folder names splits texts otherwise: a byte-level `tokenizer.json`
        # under the name of LLaMA's class would lose its spaces.
        return Loaded(transformers.PreTrainedTokenizerFast.from_pretrained(folder), False)
    except Exception as error:
        raise InputError(
            f"{folder}: no tokenizer could be loaded from it ({first_line(error)})"
        ) from error


def add_special_tokens(tokenizer: Tokenizer, texts: Sequence[str]) -> None:
    """Give a tokenizer further special tokens."""
    from transformers import AddedToken

    tokens = [AddedToken(text, special=True, normalized=False) for text in texts]
    tokenizer.add_tokens(tokens, special_tokens=True)


def _check_readable(folder: Path, transformers: Any) -> None:
    """Raise InputError for a tokenizer that is Python code, or that a missing package reads."""
    file = folder / CONFIG_FILE
    config = read_json(file) if file.exists() else {}
    auto_map = config.get("auto_map") or {}
    own = auto_map.get("AutoTokenizer") if isinstance(auto_map, dict) else auto_map
    name = config.get("tokenizer_class")
    if own and not (isinstance(name, str) and hasattr(transformers, name)):
        code = ", ".join(filter(None, own if isinstance(own, list | tuple) else [own]))
        fix = (
            f"if {FILE} alone splits texts as that code does, take auto_map out and set "
            f"tokenizer_class to {GENERIC[0]!r}"
            if (folder / FILE).exists()
            else f"save it once as a {FILE} where you trust the code"
        )
        raise InputError(
            f"{file}: auto_map={code!r} is Python code of the folder, which is never run here; "
            f"{fix}"
        )
    only_sentencepiece = (folder / SENTENCEPIECE_FILE).exists() and not (folder / FILE).exists()
    if only_sentencepiece and find_spec("sentencepiece") is None:
        raise InputError(
            f"{folder / SENTENCEPIECE_FILE}: without a {FILE} beside it, it needs the package "
            'sentencepiece: pip install "droplora-jax[sentencepiece]"'
        )


def _is_of_file(tokenizer: Tokenizer, file: Path) -> bool:
    """Whether a tokenizer gives the ids of a `tokenizer.json`; true where there is none."""
    if type(tokenizer).__name__ in GENERIC or not file.exists():
        return True
    import tokenizers

    stored = tokenizers.Tokenizer.from_file(str(file))
    stored.no_truncation()
    stored.no_padding()
    ids = stored.encode(SAMPLE, add_special_tokens=False).ids
    return tokenizer(SAMPLE, add_special_tokens=False)["input_ids"] == ids


def _is_generic(folder: Path) -> bool:
    """Whether `tokenizer.json` alone is enough, as for LLaMA 3.

    For other models transformers applies corrections that depend on the class or the model's type.
    """
    config, tokenizer = folder / "config.json", folder / CONFIG_FILE
    if not (config.exists() and tokenizer.exists() and (folder / FILE).exists()):
        return False
    said = read_json(tokenizer)
    return (
        read_json(config).get("model_type") == "llama"
        and said.get("tokenizer_class") in GENERIC
        and "auto_map" not in said
    )


@contextmanager
def _no_advice() -> Iterator[None]:
    """Without warnings; transformers has one about PyTorch, which no tokenizer needs."""
    before = logging.root.manager.disable
    logging.disable(logging.WARNING)
    try:
        yield
    finally:
        logging.disable(before)
