"""Sources: a file, a folder, a glob, a URL of any of them, or a data set of the hub."""

from __future__ import annotations

import glob
import json
import re
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from urllib.parse import parse_qsl, urlsplit

from droplora_jax.core import remote
from droplora_jax.core.errors import InputError
from droplora_jax.data.data_file import KNOWN, File, data_suffix
from droplora_jax.data.readers import READERS

HUB = re.compile(r"hf://(?!(datasets|spaces|buckets)/)")  # these three are paths for fsspec


def files_of(place: str) -> list[File]:
    """The files of a source, in the order of their names.

    Files on a bucket or on the hub are fetched into the cache first.

    Raises:
      InputError: there is no file, it can't be reached, or the source is ambiguous.
    """
    if HUB.match(place):
        return _hub_files(place)
    if remote.is_url(place):
        urls = _urls(place)
        return [File(url, remote.fetch_file(url)) for url in urls]
    path = Path(place).expanduser()
    if path.is_dir():
        return [File(str(file), file) for file in _folder_files(place, path)]
    if path.exists() or not glob.has_magic(place):
        return [File(place, path)]
    names = [name for name in glob.glob(str(path), recursive=True) if Path(name).is_file()]
    return [File(name, Path(name)) for name in _some(place, sorted(names), "matches no file")]


def _folder_files(place: str, folder: Path) -> list[Path]:
    if (folder / "dataset_dict.json").exists():
        splits = json.loads((folder / "dataset_dict.json").read_text())["splits"]
        ways = " or ".join(str(folder / split) for split in splits)
        raise InputError(f"{place}: holds the splits {', '.join(splits)}; name one: {ways}")
    if (folder / "state.json").exists() and (folder / "dataset_info.json").exists():
        # The `datasets` library saved this folder; its state lists the parts in order.
        state = json.loads((folder / "state.json").read_text())
        return [folder / part["filename"] for part in state["_data_files"]]
    names = [path.name for path in folder.iterdir() if path.is_file()]
    return [folder / name for name in _of_one_kind(place, names)]


def _urls(url: str) -> list[str]:
    if glob.has_magic(url):
        return _some(url, remote.matching(url), "matches no file")
    if (names := remote.names_in(url)) is not None:
        return [f"{url.rstrip('/')}/{name}" for name in _of_one_kind(url, names)]
    return [url]


def _of_one_kind(place: str, names: Sequence[str]) -> list[str]:
    """The data files of a folder, which may hold other files, but only one kind of data."""
    data = sorted(n for n in names if data_suffix(n) in READERS and not n.startswith("."))
    kinds = sorted({data_suffix(name) for name in data})
    if len(kinds) > 1:
        raise InputError(
            f"{place}: the folder holds {' and '.join(kinds)} files; say which: "
            f"{place.rstrip('/')}/*{kinds[0]}"
        )
    return _some(place, data, f"the folder holds no data file ({KNOWN})")


def _some(place: str, names: Sequence[str], otherwise: str) -> list[str]:
    if not names:
        raise InputError(f"{place}: {otherwise}")
    return list(names)


@dataclass(frozen=True)
class HubSet:
    """A data set of the hub: `hf://OWNER/NAME?config=main&split=train&revision=...`."""

    id: str
    config: str | None = None
    split: str = "train"
    revision: str | None = None

    @staticmethod
    def read(url: str) -> HubSet:
        parts = urlsplit(url)
        options = dict(parse_qsl(parts.query, keep_blank_values=True))
        if unknown := options.keys() - {"config", "split", "revision"}:
            raise InputError(
                f"{url}: unknown option {min(unknown)}; there are config, split, revision"
            )
        if not re.fullmatch(r"\w[\w.-]*", options.get("split", "train")):
            raise InputError(f"{url}: split={options['split']}: must be the name of one split")
        return HubSet((parts.netloc + parts.path).strip("/"), **options)


def _hub_files(url: str) -> list[File]:
    wanted = HubSet.read(url)
    try:
        import datasets
    except ImportError as error:
        raise InputError(
            f"{url}: needs the datasets library: pip install 'droplora-jax[data]'"
        ) from error
    try:
        table = datasets.load_dataset(
            wanted.id, wanted.config, split=wanted.split, revision=wanted.revision
        )
    except Exception as error:  # the library raises errors of many kinds
        raise InputError(
            f"{url}: could not be fetched from the hub ({remote.reason(error)}). Without a "
            "network, copy its files here and name them instead"
        ) from error
    parts = [Path(part["filename"]) for part in table.cache_files]
    return [File(f"{url} ({path.name})", path) for path in parts]
