"""Linear layers as einsums: which there are, and how their products are written."""

from __future__ import annotations

import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx
from oracles import relative
from small_models import linear

from droplora_jax import InputError, LinearSpec, linear_spec
from droplora_jax.adapters.layout import factor_shapes
from droplora_jax.nn.linear_spec import is_linear

SPECS = [
    (LinearSpec("...i", "io", "...o"), (2, 3, 5), (5, 4)),
    (LinearSpec("...ab", "abcd", "...cd"), (2, 3, 4), (3, 4, 2, 5)),
    (LinearSpec("bti", "io", "bto"), (2, 3, 5), (5, 4)),
    (LinearSpec("bei", "eio", "beo"), (2, 3, 5), (3, 5, 4)),
    (LinearSpec("btr", "ro", "bto"), (2, 3, 5), (5, 4)),  # "r" is taken
    (LinearSpec("BTD", "SNDH", "SBTNH"), (2, 3, 5), (3, 4, 5, 2)),  # q, k, v in one, in front
    (LinearSpec("btd", "nhd", "btnh"), (2, 3, 5), (4, 2, 5)),  # contracted letter last
]


@pytest.mark.parametrize(("spec", "x_shape", "kernel_shape"), SPECS)
def test_two_products_of_the_factors_equal_one_with_their_product(spec, x_shape, kernel_shape):
    """x (A B) = (x A) B, for every way of writing a linear layer."""
    rng = np.random.default_rng(0)
    rank = 3
    a_shape, b_shape = factor_shapes(np.zeros(kernel_shape), spec, rank)
    assert np.prod(a_shape) / rank * np.prod(b_shape) / rank == np.prod(kernel_shape) * np.prod(
        [n for c, n in zip(spec.kernel, kernel_shape, strict=True) if c in spec.batched]
    )
    x, a, b = (rng.normal(size=shape) for shape in (x_shape, a_shape, b_shape))
    kernel = np.einsum(spec.product, a, b)
    assert kernel.shape == kernel_shape
    hidden = np.einsum(spec.down, x, a)
    assert hidden.shape[-1] == rank
    expected = np.einsum(f"{spec.inputs},{spec.kernel}->{spec.outputs}", x, kernel)
    assert relative(np.einsum(spec.up, hidden, b), expected) < 1e-12


def test_what_is_not_linear_has_no_spec():
    embed = nnx.eval_shape(lambda: nnx.Embed(4, 4, rngs=nnx.Rngs(0)))
    norm = nnx.eval_shape(lambda: nnx.LayerNorm(4, rngs=nnx.Rngs(0)))
    for layer in (embed, norm, object()):
        assert not is_linear(layer)
        with pytest.raises(InputError, match="is no linear layer"):
            linear_spec(layer)
    assert is_linear(linear(4, 4))


class Shaped(nnx.Module):
    """What Tunix's Einsum is, in a few lines."""

    def __init__(self):
        self.einsum_str, self.shape = "BTD,DNH->BTNH", (4, 2, 3)
        self.w = nnx.Param(np.ones(self.shape, np.float32))

    def __call__(self, x):
        return jnp.einsum(self.einsum_str, x, self.w[...])


def test_layers_of_other_libraries_are_known_by_the_names_of_their_classes():
    assert not is_linear(Shaped())
    namespace = {"__module__": "tunix.models.llama3.model", "__qualname__": "Einsum"}
    theirs = type("Einsum", (Shaped,), namespace)
    own = type("Own", (theirs,), {})
    for layer in (theirs(), own()):
        assert linear_spec(layer) == LinearSpec("BTD", "DNH", "BTNH", attribute="w")
    theirs.w_scale = 2.0
    with pytest.raises(InputError, match="scaled as it is read"):
        linear_spec(own())
