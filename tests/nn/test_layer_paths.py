"""Layers of a model and of its stacks by patterns of their paths."""

from __future__ import annotations

import pytest

from droplora_jax import InputError
from droplora_jax.nn.layer_paths import dotted, select

STACK = {path: (3,) for path in [("layers", "q_proj"), ("layers", "up_proj")]} | {("head",): ()}


@pytest.mark.parametrize(
    ("targets", "exclude", "chosen"),
    [
        (("q_proj",), (), {"layers.q_proj": (True,) * 3}),
        (("all-linear",), ("head",), {"layers.q_proj": (True,) * 3, "layers.up_proj": (True,) * 3}),
        ((r"layers\.[02]\.q", "head"), (), {"layers.q_proj": (True, False, True), "head": (True,)}),
        (
            ("paper",),
            (r"\.1\.",),
            {p: (True, False, True) for p in ("layers.q_proj", "layers.up_proj")},
        ),
    ],
)
def test_targets_of_some_layers_of_a_stack(targets, exclude, chosen):
    found = select(STACK, targets, exclude)
    assert {dotted(path): layers for path, layers in found.items()} == chosen


@pytest.mark.parametrize(("targets", "exclude"), [(("x",), ()), (("q_proj",), (r"\.3\.",))])
def test_patterns_that_match_nothing(targets, exclude):
    with pytest.raises(InputError, match=r"matches no module; linear modules are layers\.q_proj"):
        select(STACK, targets, exclude)
