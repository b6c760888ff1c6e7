"""`generation_config.json`: the tokens at which a model stops."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from droplora_jax.core.files import read_json, write_json

GENERATION_FILE = "generation_config.json"
# Without a generation_config.json, transformers takes these keys from config.json.
SHARED_KEYS = ("bos_token_id", "eos_token_id", "pad_token_id")


def eos_ids(folder: Path) -> tuple[int, ...]:
    """The EOS tokens that a model's folder names, in its order.

    Those of `generation_config.json`, or of `config.json` where it names none.
    """
    for file in (folder / GENERATION_FILE, folder / "config.json"):
        if file.exists() and (ids := _listed(read_json(file))):
            return ids
    return ()


def add_end_tokens(folder: Path, token_ids: Sequence[int]) -> None:
    """Let whoever generates with the model in a folder stop at these tokens too."""
    eos = eos_ids(folder)
    ids = list(dict.fromkeys([*eos, *token_ids]))
    if len(ids) == len(eos):
        return
    file = folder / GENERATION_FILE
    if file.exists():
        config = read_json(file)
    else:
        shared = read_json(folder / "config.json")
        config = {key: shared[key] for key in SHARED_KEYS if shared.get(key) is not None}
    write_json(file, {**config, "eos_token_id": ids})


def _listed(config: Mapping[str, Any]) -> tuple[int, ...]:
    given = config.get("eos_token_id")
    return () if given is None else tuple(given) if isinstance(given, list) else (given,)
