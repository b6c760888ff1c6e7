"""The functions that write a model for other tools, by the name of their format."""

from __future__ import annotations

from collections.abc import Mapping
from importlib import import_module
from pathlib import Path
from typing import TYPE_CHECKING, Protocol, runtime_checkable

from droplora_jax.hf import EXPORTERS

if TYPE_CHECKING:
    from droplora_jax.models.decoder import Decoder


@runtime_checkable
class Exporter(Protocol):
    """Writes a model with adapters as a folder.

    The base of the model may be shapes only; an exporter that needs its weights reads them from
    `model.source.folder`. The folder appears under its name only when it is complete; one that
    exists and holds something is refused. Values that are not finite are refused.

    Args:
      model: with adapters, in one process.
      folder: where to write.
      dtype: of the stored tensors; None for the format's default.
      record: what else to write down beside the adapter, such as the template of its data.

    Returns:
      What was written, in words for the user.

    Raises:
      InputError: the folder holds something, a value that is not finite, or no space.
    """

    def __call__(
        self,
        model: Decoder,
        folder: Path,
        *,
        dtype: str | None = None,
        record: Mapping[str, object] | None = None,
    ) -> str: ...


def exporter(format: str) -> Exporter:
    """The exporter of a format in `EXPORTERS`; its module is imported when it is asked for."""
    return import_module(EXPORTERS[format]).export
