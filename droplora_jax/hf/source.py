"""Where a base model is: a folder, a hub id at a commit or a bucket; its `config.json`."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

from droplora_jax.core import remote
from droplora_jax.core.errors import InputError, first_line
from droplora_jax.core.files import check_links, read_json
from droplora_jax.hf.companions import REPORT_FILE
from droplora_jax.models.config import ModelConfig, Source
from droplora_jax.models.decoder import Decoder
from droplora_jax.models.families import FAMILIES
from droplora_jax.models.families.base import Family

# The files of a hub repository that are fetched: no pickles, no other frameworks' weights.
SMALL_PATTERNS = [
    "*.json",
    "tokenizer*",
    "*.model",
    "*.jinja",
    "additional_chat_templates/*.jinja",
    "*.txt",
    "LICENSE*",
    "USE_POLICY*",
]
HUB_PATTERNS = ["*.safetensors", *SMALL_PATTERNS]


def resolve(path: str | Path, revision: str | None = None) -> Path:
    """The local folder of a path, hub id or URL.

    A hub id is fetched into huggingface_hub's cache (and found there when offline); of a bucket
    only the small files are fetched, and its tensors are read where they are.
    """
    if remote.is_url(path):
        return remote.fetch(str(path), SMALL_PATTERNS)
    folder = Path(path).expanduser()
    if folder.is_dir():
        folder = folder.resolve()
        check_links(folder, HUB_PATTERNS)
        return folder
    parts = str(path).split("/")
    if len(parts) != 2 or not all(parts) or str(path).startswith((".", "~")):
        raise InputError(f"path={str(path)!r}: no such folder (a hub id is 'owner/name')")
    from huggingface_hub import snapshot_download
    from huggingface_hub.errors import HfHubHTTPError, HFValidationError, LocalEntryNotFoundError

    try:
        fetched = snapshot_download(str(path), revision=revision, allow_patterns=HUB_PATTERNS)
    except (HfHubHTTPError, HFValidationError, LocalEntryNotFoundError, OSError) as error:
        reason = first_line(error)
        raise InputError(
            f"path={str(path)!r}: no such folder, and not to be had from the hub ({reason})"
        ) from error
    return Path(fetched)


def source_of(path: str | Path, folder: Path) -> Source:
    """A record of where a model comes from that holds in any working directory and later on.

    Args:
      folder: what `path` was resolved to.
    """
    if remote.is_url(path):
        return Source(str(path), folder)
    if Path(path).expanduser().is_dir():
        return Source(str(folder), folder)
    return Source(str(path), folder, revision=folder.name)  # a snapshot is named for its commit


def source_of_model(model: Decoder) -> Source:
    """Where a loaded model's weights came from."""
    if model.source is None:
        raise InputError("the model was not loaded from a folder, so there is no base to export")
    return model.source


def ignored_config_keys(folder: Path) -> tuple[str, ...]:
    """The keys of its base's `config.json` that were ignored when a merged folder was made."""
    report = folder / REPORT_FILE
    return tuple(read_json(report).get("ignored_config_keys", ())) if report.exists() else ()


def source_folder(model: Decoder) -> Path:
    """The folder that a loaded model's weights came from."""
    return source_of_model(model).folder


def base_vocabulary(source: Source) -> int:
    """The rows of the base's embedding, which an adapter may have changed."""
    return int(read_json(source.folder / "config.json")["vocab_size"])


def base_ties(source: Source) -> bool:
    """Whether the base's `config.json` ties the head to the embedding; an adapter may not."""
    return bool(read_json(source.folder / "config.json").get("tie_word_embeddings", False))


def read_config(folder: Path, ignore: Sequence[str] = ()) -> tuple[Family, ModelConfig]:
    """The family and shape that a folder's `config.json` describes, every key accounted for."""
    file = folder / "config.json"
    if not file.exists():
        raise InputError(f"{file}: missing{_adapter_hint(folder)}")
    hf = read_json(file)
    model_type = hf.get("model_type")
    if model_type not in FAMILIES:
        raise InputError(
            f"{file}: model_type={model_type!r} is not supported; supported: {', '.join(FAMILIES)}"
        )
    family = FAMILIES[model_type]
    family.check_keys(hf, str(file), ignore)
    try:
        return family, family.model_config(hf)
    except KeyError as error:
        raise InputError(f"{file}: lacks the key {error.args[0]!r}") from error
    except InputError as error:
        raise InputError(f"{file}: {error}") from error


def _adapter_hint(folder: Path) -> str:
    """What to do with an adapter that is named where a base is expected."""
    peft = folder / "adapter_config.json"
    if not peft.exists():
        return ""
    base = read_json(peft).get("base_model_name_or_path") or "its base"
    return (
        f"; the folder holds an adapter for {base}: name {folder} itself where an adapter is "
        f"expected (generate, evaluate and export take it as it is; in a run model.path={base} "
        f"and model.adapter={folder})"
    )
