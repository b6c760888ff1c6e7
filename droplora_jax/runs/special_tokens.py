"""Special tokens that a frozen embedding or head can't tell apart, found before a run begins.

A base gives the tokens that it was not trained on rows that are equal or zero, up to little noise.
Adapters between the embedding and the head can't learn to write such a token: whatever leaves the
last layer has the same product with equal rows of the head.
"""

from __future__ import annotations

from collections.abc import Collection, Iterator, Mapping, Sequence
from dataclasses import dataclass

import numpy as np

from droplora_jax.core.errors import InputError
from droplora_jax.data.end_markers import EndMarkers, token_ids
from droplora_jax.data.rows import Rows
from droplora_jax.hf.base import Base
from droplora_jax.hf.tensor_files import TensorFiles, open_source

EMBED, HEAD = "embed", "lm_head"
PARAMETERS = {EMBED: "embed.embedding", HEAD: "lm_head.kernel"}
LOOKED_AT = 256  # rows of the data
NAMED = 3  # tokens that a message names
ALIKE = 1e-2  # distance of two rows, relative to the larger; trained rows are much further apart
UNTRAINED = 1e-10  # a row with no larger number is zero


@dataclass(frozen=True)
class UsedTokens:
    """The special and added tokens in the rows of a run.

    Attributes:
      read: those that the model reads.
      written: those that it learns to write, such as the ends of answers.
    """

    read: frozenset[int]
    written: frozenset[int]

    @classmethod
    def of(cls, rows: Rows, end_markers: EndMarkers, base: Base) -> UsedTokens:
        special = frozenset(token_ids(base.tokenizer).values())
        places = np.unique(np.linspace(0, len(rows) - 1, LOOKED_AT).astype(int)).tolist()
        read = {int(id) for i in places for id in np.unique(rows[i].ids)}
        written = {int(id) for i in places for id in np.unique(rows[i].ids[rows[i].trained])}
        return cls(special & read, special & written | set(end_markers.token_ids))


def check_special_tokens(
    used: UsedTokens, base: Base, trained: Collection[str], targets: str | Sequence[str]
) -> Iterator[str]:
    """A warning of tokens that a frozen embedding can't tell apart.

    Args:
      trained: the parts of the model that the run trains, such as `lm_head`.
      targets: `adapter.targets` of the run, for the fix.

    Raises:
      InputError: the run is to learn tokens that a frozen head can't tell from others.
    """
    names = {id: text for text, id in token_ids(base.tokenizer).items()}
    head = EMBED if base.shape.tie_embeddings else HEAD
    if head not in trained:
        rows = _rows(base, head, names)
        groups = _equal(rows)
        known = sorted(used.written & groups.keys())
        alike = [id for id in known if len(groups[id]) > 1 or _is_zero(rows[id])]
        if alike:
            raise InputError(
                f"adapter.targets={targets!r}: the frozen {head} has "
                f"{_described(alike, groups, names)}, so the run can't learn to write them (these "
                f"rows are untrained in the base); {_fix(base, targets)}"
            )
    if EMBED not in trained:
        groups = _equal(_rows(base, EMBED, used.read))
        alike = [id for id in sorted(groups) if len(groups[id]) > 1]
        if alike:
            yield (
                f"warning: adapter.targets={targets!r}: the frozen {EMBED} has the same row for "
                f"{_listed(alike, names)}, so the model reads them as one token (these rows are "
                f"untrained in the base); {_fix(base, targets)}"
            )


def check_added_tokens(base: Base, trained: Collection[str], targets: str | Sequence[str]) -> None:
    """Raise InputError unless the rows of tokens that were added to the base are trained."""
    added = base.source.added
    frozen = [end for end in _ends(base) if end not in trained]
    if added is not None and added.first < added.stop and frozen:
        raise InputError(
            f"model.add_tokens={list(added.texts)!r}: the row of a new token is the mean of the "
            f"others, and the frozen {' and '.join(frozen)} would keep it so; "
            f"{_fix(base, targets)}"
        )


def _ends(base: Base) -> list[str]:
    return [EMBED] if base.shape.tie_embeddings else [EMBED, HEAD]


def _rows(base: Base, module: str, ids: Collection[int]) -> dict[int, np.ndarray]:
    """The rows of tokens in the embedding or the head, as they are stored."""
    tensor = base.family.tensor_names(base.shape)[PARAMETERS[module]].pattern
    files = open_source(base.source)
    vocabulary = files.shape(tensor)[0]
    return dict(_read(files, tensor, [id for id in sorted(ids) if id < vocabulary]))


def _read(files: TensorFiles, tensor: str, ids: Sequence[int]) -> Iterator[tuple[int, np.ndarray]]:
    """The rows of ascending tokens; neighbours are read together."""
    starts = [i for i, id in enumerate(ids) if i == 0 or id != ids[i - 1] + 1]
    for first, stop in zip(starts, [*starts[1:], len(ids)], strict=True):
        block = files.read(tensor, (slice(ids[first], ids[stop - 1] + 1),))
        yield from zip(ids[first:stop], block, strict=True)


def _equal(rows: Mapping[int, np.ndarray]) -> dict[int, list[int]]:
    """For every token the tokens with its row, itself included."""
    if not rows:
        return {}
    table, ids = np.stack(list(rows.values())).astype(np.float64), np.array(list(rows))
    squares = np.sum(table**2, axis=1)
    distances = squares[:, None] + squares - 2 * table @ table.T
    near = distances <= ALIKE**2 * np.maximum(squares[:, None], squares)
    zero = np.abs(table).max(axis=1) <= UNTRAINED
    near |= zero[:, None] & zero
    return {int(id): ids[others].tolist() for id, others in zip(ids, near, strict=True)}


def _is_zero(row: np.ndarray) -> bool:
    return bool(np.abs(row).max() <= UNTRAINED)


def _described(
    alike: Sequence[int], groups: Mapping[int, Sequence[int]], names: Mapping[int, str]
) -> str:
    """What is wrong with the rows of the tokens, with one that they can't be told from."""
    if all(len(groups[id]) == 1 for id in alike):
        return f"a row of zeros for {_listed(alike, names)}"
    others = sorted({other for id in alike for other in groups[id]} - set(alike))
    more = f" and {len(others) - 1} more" if len(others) > 1 else ""
    unused = f" and for {_listed(others[:1], names)}{more}" if others else ""
    return f"the same row for {_listed(alike, names)}{unused}"


def _listed(ids: Sequence[int], names: Mapping[int, str]) -> str:
    shown = [f"{names[id]!r} ({id})" for id in ids[:NAMED]]
    more = [f"{len(ids) - NAMED} more"] if len(ids) > NAMED else []
    return ", ".join(shown + more)


def _fix(base: Base, targets: str | Sequence[str]) -> str:
    """The overrides that train the ends of the model."""
    ends = _ends(base)
    given = [targets] if isinstance(targets, str) else list(targets)
    chosen = ", ".join(dict.fromkeys([*given, *ends]))
    return f"set adapter.targets='[{chosen}]', or adapter.train_whole='[{', '.join(ends)}]'"
