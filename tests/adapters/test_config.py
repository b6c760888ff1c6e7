"""Options of the kinds of adapter, of all layers and of some."""

from __future__ import annotations

import dataclasses

import pytest

from droplora_jax import DropLoRA, InputError
from droplora_jax.adapters import ADAPTERS
from droplora_jax.nn.layer_paths import layer_names


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"rank": 0}, r"rank=0"),
        ({"alpha": 0.0}, r"alpha=0\.0"),
        ({"alpha": -1.0}, r"alpha=-1\.0"),
        ({"alpha": float("inf")}, r"alpha=inf"),
        ({"alpha": float("nan")}, r"alpha=nan"),
        ({"drop_rate": 1.0}, r"drop_rate=1\.0"),
        ({"drop_rate": -0.1}, r"drop_rate=-0\.1"),
        ({"drop_rate": float("nan")}, r"drop_rate=nan"),
        ({"rank": 2, "drop_rate": 0.9, "sampler": "exact"}, r"drop_rate=0\.9.*no rank of 2"),
    ],
)
def test_impossible_options_name_the_key_and_the_value(options, message):
    with pytest.raises(InputError, match=message):
        DropLoRA(**options)


def test_kinds_are_listed_under_their_own_names():
    for name, kind in ADAPTERS.items():
        assert kind().kind == name
        assert hash(kind()) == hash(kind())


def test_ranks_and_scales_by_pattern():
    config = DropLoRA(
        rank=8,
        alpha=16,
        rank_pattern={r"\.1\.q_proj": 2, "q_proj": 4},
        alpha_pattern={r"layers\.2": 1},
        rank_stabilized=True,
    )
    names = layer_names(("layers", "q_proj"), (3,))
    branches = config.branches(names, (True, True, False))
    assert [(b.rank, b.alpha) for b in branches] == [(4, 16), (2, 16), (0, 1)]
    assert [b.scale for b in branches] == [8, 16 / 2**0.5, 0]
    assert config.branches(layer_names(("head",), ())) == ((8, 16, 16 / 8**0.5, 0.5),)
    assert hash(config) == hash(dataclasses.replace(config))


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"rank_pattern": {"q": 0}}, r"rank_pattern\.q=0: must be at least 1"),
        ({"alpha_pattern": {"q": -1.0}}, r"alpha_pattern\.q=-1\.0: must be a positive"),
        ({"rank_pattern": {"q": 1}, "sampler": "exact"}, "keeps no rank of 1"),
    ],
)
def test_impossible_patterns(options, message):
    with pytest.raises(InputError, match=message):
        DropLoRA(**options)
