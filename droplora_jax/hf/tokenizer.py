"""The tokenizer of a model's folder."""

from __future__ import annotations

import logging
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from droplora_jax.core.errors import InputError, first_line
from droplora_jax.core.files import read_json
from droplora_jax.data.templates.base import Tokenizer

# Classes that add nothing to what `tokenizer.json` says.
GENERIC = ("PreTrainedTokenizerFast", "TokenizersBackend")


def load_tokenizer(folder: Path) -> Tokenizer:
    """The Hugging Face tokenizer in a folder.

    Raises:
      InputError: there is none, or it is broken.
    """
    with _no_advice():
        import transformers
    try:
        if _is_generic(folder):
            # What AutoTokenizer comes to, but it imports PyTorch on the way where it finds it.
            return transformers.PreTrainedTokenizerFast.from_pretrained(folder)
        return transformers.AutoTokenizer.from_pretrained(folder, local_files_only=True)
    except Exception as error:
        raise InputError(
            f"{folder}: no tokenizer could be loaded from it ({first_line(error)})"
        ) from error


def _is_generic(folder: Path) -> bool:
    """Whether `tokenizer.json` alone is enough, as for LLaMA 3.

    For other models transformers applies corrections that depend on the class or the model's type.
    """
    config, tokenizer = folder / "config.json", folder / "tokenizer_config.json"
    if not (config.exists() and tokenizer.exists() and (folder / "tokenizer.json").exists()):
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
