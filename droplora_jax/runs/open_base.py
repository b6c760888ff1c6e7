"""The base model that a run's `model` section names."""

from __future__ import annotations

from droplora_jax.core.errors import InputError
from droplora_jax.hf.base import Base
from droplora_jax.runs.config import BaseConfig


def open_base(config: BaseConfig) -> Base:
    """Open the base of a run; a command does it once and passes the base on.

    Raises:
      InputError: as `Base.open`, in the words of the run's file.
    """
    try:
        return Base.open(config.path, config.revision, config.ignore_config_keys)
    except InputError as error:
        if str(error).startswith("path="):
            raise error.within("model") from error
        raise  # it names a file of the base
