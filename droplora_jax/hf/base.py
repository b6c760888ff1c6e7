"""A base model: its folder, resolved and checked once, from which everything else of it is read."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from functools import cached_property
from pathlib import Path

from jax.sharding import Mesh
from jax.typing import DTypeLike

from droplora_jax.data.templates.base import Tokenizer
from droplora_jax.hf import source, tied_head
from droplora_jax.hf.added_tokens import added_tokens
from droplora_jax.hf.companions import tokenizer_of
from droplora_jax.hf.peft import ends
from droplora_jax.hf.tokenizer import Loaded
from droplora_jax.hf.weight_loading import abstract_model, read_weights
from droplora_jax.models.config import ModelConfig, Source
from droplora_jax.models.decoder import Decoder
from droplora_jax.models.families.base import Family
from droplora_jax.nn.options import Quantization
from droplora_jax.nn.quantized_kernel import qwix


@dataclass(frozen=True)
class Base:
    """A base model that was found and whose `config.json` was read; no weight is loaded.

    A command opens its base once and passes it on: to open it again would fetch it again, where it
    is a hub id or on a bucket.

    Attributes:
      folder: the local folder; for a bucket, the copy of its small files.
      family: the names and the rules of its checkpoints.
      shape: the decoder that `config.json` describes.
      source: where it came from, a hub id with its commit.
    """

    folder: Path
    family: Family
    shape: ModelConfig
    source: Source

    @classmethod
    def open(
        cls, path: str | Path, revision: str | None = None, ignore: Sequence[str] = ()
    ) -> Base:
        """Find a base model and read its `config.json`.

        Where that ties the head to the embedding, the tables of both are compared, if the files
        hold both: two that differ are an untied model's.

        Args:
          path: a folder with `config.json` and safetensors, the URL of one on a bucket (`gs://`,
            `s3://`), or a hub id.
          revision: branch, tag or commit of a hub id.
          ignore: keys of `config.json` known to change nothing, besides those that a merged folder
            records.

        Raises:
          InputError: no such folder or hub id, or a key that is missing, unknown or not supported.
        """
        folder = source.resolve(path, revision)
        ignored = tuple(dict.fromkeys((*ignore, *source.ignored_config_keys(folder))))
        family, shape = source.read_config(folder, ignored)
        found = replace(source.source_of(path, folder), ignored_config_keys=ignored)
        return cls(folder, family, *tied_head.as_stored(shape, found))

    def under(self, adapters: Sequence[Path]) -> Base:
        """The base as adapters in PEFT's format have it: with the ends and the tokenizer of theirs.

        Raises:
          InputError: an adapter that was made for another base, or several that differ in this.
        """
        shape, source = ends.under(self.shape, self.source, adapters)
        return replace(self, shape=shape, source=source)

    def with_tokens(self, texts: Sequence[str]) -> Base:
        """The base with further special tokens; those that its tokenizer has stay as they are.

        A new token takes the next id of the tokenizer. Its row in the embedding, and in the head
        if that is another table, is the mean of the rows of the ids before; a table grows if it
        has no row for the token.

        Raises:
          InputError: an empty text, or a tokenizer that can't be loaded.
        """
        added = added_tokens(texts, self.tokenizer, self.shape) if texts else None
        if added is None:
            return self
        shape = replace(self.shape, vocab_size=max(self.shape.vocab_size, added.stop))
        return replace(self, shape=shape, source=replace(self.source, added=added))

    @cached_property
    def tokenizer(self) -> Tokenizer:
        """The Hugging Face tokenizer, loaded when it is first asked for."""
        return self._loaded_tokenizer.tokenizer

    @property
    def tokenizer_warning(self) -> str | None:
        """What other tools make of the folder's tokenizer, where they split texts otherwise."""
        if self._loaded_tokenizer.is_transformers:
            return None
        folder = self.source.tokenizer or self.folder
        return (
            f"warning: {folder / 'tokenizer_config.json'}: the installed transformers reads "
            "the tokenizer under the name of its tokenizer_class, which splits texts otherwise "
            "than tokenizer.json; here tokenizer.json counts. For other tools set tokenizer_class "
            "to 'PreTrainedTokenizerFast'"
        )

    @cached_property
    def _loaded_tokenizer(self) -> Loaded:
        return tokenizer_of(self.source)

    def abstract(
        self, mesh: Mesh, *, dtype: DTypeLike, quantization: Quantization | None = None
    ) -> Decoder:
        """The model with shapes, dtypes and shardings in place of arrays."""
        return abstract_model(
            self.shape, mesh=mesh, dtype=dtype, source=self.source, quantization=quantization
        )

    def load(
        self, mesh: Mesh, *, dtype: DTypeLike, quantization: Quantization | None = None
    ) -> Decoder:
        """The model with its weights, each read straight onto its devices.

        Raises:
          InputError: a tensor that is missing, of another shape, or not finite.
        """
        if quantization is not None and quantization.kinds:
            qwix()  # before anything is read
        return read_weights(
            self.source, self.abstract(mesh, dtype=dtype, quantization=quantization)
        )
