"""Random keys by name and path, so that no random number depends on an order of calls.

Every key is `threefry2x32`: the bits of JAX's other generators depend on the sharding.
"""

from __future__ import annotations

import hashlib
from collections.abc import Sequence
from typing import NamedTuple

import jax
from jaxtyping import Array, Int, Key


def root_key(seed: int) -> Key[Array, ""]:
    """The key from which all others of a run are derived.

    >>> key = root_key(0)
    >>> key.shape, bool((jax.random.key_data(key) == jax.random.key_data(root_key(0))).all())
    ((), True)
    """
    return jax.random.key(seed, impl="threefry2x32")


class RunKeys(NamedTuple):
    """The roots of all random numbers of a run; nothing else derives a key from its seed.

    Attributes:
      mask: for the masks; step t of training draws from `fold_in(mask, t)`.
      init: for the initial factors of the adapters.
      generate: for sampling tokens.
    """

    mask: Key[Array, ""]
    init: Key[Array, ""]
    generate: Key[Array, ""]


def run_keys(seed: int) -> RunKeys:
    """The keys of a run's seed, each independent of the others."""
    root = root_key(seed)
    return RunKeys(*(fold_name(root, name) for name in RunKeys._fields))


def fold_name(key: Key[Array, ""], name: str) -> Key[Array, ""]:
    """The key for `name`."""
    digest = hashlib.sha256(name.encode()).digest()
    return jax.random.fold_in(key, int.from_bytes(digest[:4], "little"))


def fold_path(key: Key[Array, ""], path: Sequence[str | int]) -> Key[Array, ""]:
    """The key for the module at `path`.

    Indices are folded last, so layer 3 of a list (`layers.3.q_proj`) and slice 3 of stacked
    layers (`layers.q_proj`, index 3 through `fold_stack`) have the same key.
    """
    indices = [part for part in path if isinstance(part, int)]
    key = fold_name(key, ".".join(part for part in path if isinstance(part, str)))
    for index in indices:
        key = jax.random.fold_in(key, index)
    return key


def fold_stack(key: Key[Array, ""], stack: tuple[int, ...]) -> Key[Array, "*stack"]:
    """One key for every entry of the leading axes `stack` of a stacked module."""
    keys = key
    for size in stack:
        keys = fold_each(keys, jax.numpy.arange(size))
    return keys


def fold_each(keys: Key[Array, "*k"], data: Int[Array, "*d"]) -> Key[Array, "*k *d"]:
    """Fold every number of `data` into every key; shape [*keys, *data]."""
    fold = jax.random.fold_in
    for _ in range(data.ndim):
        fold = jax.vmap(fold, in_axes=(None, 0))
    for _ in range(keys.ndim):
        fold = jax.vmap(fold, in_axes=(0, None))
    return fold(keys, data)


def fold_rows(keys: Key[Array, "*k B"], data: Int[Array, "B *d"]) -> Key[Array, "*k B *d"]:
    """Fold `data[b]` into the keys of row b; shape [*stack, B, *rest of data]."""
    fold = jax.vmap(fold_each)
    for _ in range(keys.ndim - 1):
        fold = jax.vmap(fold, in_axes=(0, None))
    return fold(keys, data)
