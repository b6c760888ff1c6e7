"""The base model that a run's `model` section names."""

from __future__ import annotations

from pathlib import Path

from droplora_jax.core.errors import InputError
from droplora_jax.hf.base import Base
from droplora_jax.models.families.config_keys import UnfitConfigKeys
from droplora_jax.runs.config import BaseConfig


def open_base(config: BaseConfig) -> Base:
    """Open the base of a run; a command does it once and passes the base on.

    The base of a run that trains on from an adapter has the adapter's ends and tokenizer.

    Raises:
      InputError: as `Base.open`, in the words of the run's file.
    """
    try:
        base = Base.open(config.path, config.revision, config.ignore_config_keys)
    except UnfitConfigKeys as error:
        raise error.said_as(f"model.ignore_config_keys=[{','.join(error.keys)}]") from error
    except InputError as error:
        if str(error).startswith("path="):
            raise error.within("model") from error
        raise  # it names a file of the base
    if config.adapter is None:
        return _with_tokens(base, config)
    try:
        base = base.under([Path(config.adapter).expanduser()])
    except InputError as error:
        raise InputError(f"{error} (model.adapter={config.adapter!r})") from error
    if _with_tokens(base, config) is not base:
        raise InputError(
            f"model.add_tokens={list(config.add_tokens)!r}: model.adapter={config.adapter!r} was "
            "trained without them, and its tables stay as they are; merge it first (droplora "
            "export --format merged) and add the tokens to the merged folder"
        )
    return base


def _with_tokens(base: Base, config: BaseConfig) -> Base:
    try:
        return base.with_tokens(config.add_tokens)
    except InputError as error:
        raise (error.within("model") if str(error).startswith("add_tokens=") else error) from error
