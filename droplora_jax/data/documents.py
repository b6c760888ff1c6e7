"""Records to documents, with errors that name the record."""

from __future__ import annotations

from dataclasses import dataclass

from droplora_jax.core.errors import InputError
from droplora_jax.data.columns import described, recognised, renamed
from droplora_jax.data.config import AUTO, DataConfig
from droplora_jax.data.formats import FORMATS
from droplora_jax.data.formats.base import Empty
from droplora_jax.data.record import Fields
from droplora_jax.data.templates import TEMPLATES
from droplora_jax.data.templates.base import Document, Tokenizer


@dataclass(frozen=True)
class Writer:
    """Turns the records of one file into documents.

    Attributes:
      format: a name in `FORMATS`.
      template: a name in `TEMPLATES`.
    """

    format: str
    template: str
    tokenizer: Tokenizer
    config: DataConfig

    @classmethod
    def of(cls, where: str, record: Fields, tokenizer: Tokenizer, config: DataConfig) -> Writer:
        """The writer for a file, chosen by its first record.

        Raises:
          InputError: no format has its keys.
        """
        name = config.format
        if name == AUTO:
            try:
                name = recognised(record, config.columns, config.ignore_keys)
            except InputError as error:
                raise InputError(f"{where}: {error}") from error
        default = FORMATS[name].template
        template = default if config.template == AUTO else config.template
        return cls(name, template, tokenizer, config)

    def __call__(self, where: str, record: Fields) -> Document:
        """The document of a record.

        Raises:
          Empty: a text that must not be empty is.
          InputError: the record is not as its format or template needs it; names the place.
        """
        format, columns = FORMATS[self.format], self.config.columns
        try:
            record = renamed(record, columns, self.config.ignore_keys)
            example = format.example(record, columns.values())
        except Empty:
            raise
        except InputError as error:
            raise InputError(f"{where}: {error}{self._expected}") from error
        try:
            document = TEMPLATES[self.template](example, self.tokenizer)
        except InputError as error:
            raise InputError(f"{where}: {error}") from error
        return document.trained_on(self.config.train_on)

    @property
    def _expected(self) -> str:
        """What the format reads, to be appended to an error; not to each in a list of many."""
        if self.config.bad_rows == "drop":
            return ""
        keys = FORMATS[self.format].keys
        return f"; the format {self.format} has the keys {keys}{described(self.config.columns)}"
