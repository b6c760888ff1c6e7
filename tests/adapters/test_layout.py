"""Where the factors lie, and their shapes."""

from __future__ import annotations

import jax
import numpy as np
import pytest
from flax import nnx
from jax.sharding import NamedSharding
from jax.sharding import PartitionSpec as P
from small_models import linear

import droplora_jax as dl
from droplora_jax import DropLoRA, LinearSpec, linear_spec
from droplora_jax.adapters import layout
from droplora_jax.adapters.layout import factor_shapes, factor_shardings
from droplora_jax.core import prng
from droplora_jax.core.config import MeshConfig
from droplora_jax.core.sharding import make_mesh

PLAIN = LinearSpec("...i", "io", "...o")

# A kernel's sharding, and what A [I, R] and B [R, O] are to have on a mesh 2 x 2 x 2.
FACTOR_SHARDINGS = [
    # q, k, v, gate, up: input on fsdp, output on tensor; B takes fsdp on its long dimension too.
    (P("fsdp", "tensor"), P("fsdp", None), P(None, ("tensor", "fsdp"))),
    # o, down: the other way round, and A takes it.
    (P("tensor", "fsdp"), P(("tensor", "fsdp"), None), P(None, "fsdp")),
    (P(None, "tensor"), P("fsdp", None), P(None, ("tensor", "fsdp"))),
    (P(), P("fsdp", None), P(None, "fsdp")),
]


def kernel_on(mesh: jax.sharding.Mesh, shape: tuple[int, ...], *axes) -> jax.ShapeDtypeStruct:
    return jax.ShapeDtypeStruct(shape, np.float32, sharding=NamedSharding(mesh, P(*axes)))


@pytest.mark.parametrize("stacked", [False, True])
@pytest.mark.parametrize(("kernel_spec", "a_spec", "b_spec"), FACTOR_SHARDINGS)
def test_factors_lie_as_the_kernel_does_and_none_is_replicated(
    kernel_spec, a_spec, b_spec, stacked
):
    mesh = make_mesh(MeshConfig(data=2, fsdp=2, tensor=2))
    front, lead = ((3,), (None,)) if stacked else ((), ())
    kernel = kernel_on(mesh, (*front, 16, 32), *lead, *kernel_spec)
    for sharding, spec in zip(factor_shardings(kernel, PLAIN), (a_spec, b_spec), strict=True):
        expected = NamedSharding(mesh, P(*lead, *spec))
        assert sharding.is_equivalent_to(expected, kernel.ndim), sharding


def test_factors_are_made_where_they_lie():
    mesh = make_mesh(MeshConfig(data=2, fsdp=2, tensor=2))
    layout = NamedSharding(mesh, P(None, "fsdp", "tensor"))
    kernel = jax.device_put(np.zeros((3, 16, 32), np.float32), layout)
    layer = linear(16, 32, use_bias=False)
    layer.kernel.set_value(kernel)
    adapter = DropLoRA(rank=4).adapt(layer, linear_spec(layer), ("q_proj",), prng.root_key(0))
    a, b = adapter.lora_a.get_value(), adapter.lora_b.get_value()
    assert (a.shape, b.shape) == ((3, 16, 4), (3, 4, 32))
    for value, sharding in zip((a, b), factor_shardings(kernel, PLAIN), strict=True):
        assert value.sharding.is_equivalent_to(sharding, value.ndim), value.sharding


def test_a_dimension_that_fsdp_does_not_divide_is_left_alone():
    mesh = make_mesh(MeshConfig(data=1, fsdp=8, tensor=1))
    a, b = factor_shardings(kernel_on(mesh, (16, 12), "fsdp", None), PLAIN)
    assert a.is_equivalent_to(NamedSharding(mesh, P("fsdp", None)), 2)
    assert b.is_equivalent_to(NamedSharding(mesh, P()), 2)


def test_factors_of_kernels_with_several_dimensions():
    mesh = make_mesh(MeshConfig(data=2, fsdp=2, tensor=2))
    kernel = kernel_on(mesh, (3, 16, 4, 8), None, "fsdp", "tensor", None)
    spec = LinearSpec("...i", "inh", "...nh")  # stacked once
    a, b = factor_shardings(kernel, spec)
    assert factor_shapes(kernel, spec, 5) == ((3, 16, 5), (3, 5, 4, 8))
    assert a.is_equivalent_to(NamedSharding(mesh, P(None, "fsdp", None)), 3)
    assert b.is_equivalent_to(NamedSharding(mesh, P(None, None, "tensor", "fsdp")), 4)


def test_no_mesh_no_sharding():
    assert factor_shardings(np.zeros((4, 4)), PLAIN) == (None, None)


def test_layers_of_equal_shapes_share_the_program_of_their_first_factors():
    model = nnx.Sequential(*(linear(6, 6, seed=i) for i in range(3)), linear(6, 4))
    layout._program.cache_clear()
    config = dl.DropLoRA(rank=2, targets="all-linear")
    first = dl.inject(model, config, key=dl.root_key(0))
    assert layout._program.cache_info().misses == 2
    again = dl.inject(model, config, key=dl.root_key(1))
    assert layout._program.cache_info().misses == 2
    factors = [leaf for m in (first, again) for leaf in jax.tree.leaves(dl.split(m)[1])]
    values = {factor.tobytes() for factor in jax.device_get(factors) if factor.any()}
    assert len(values) == 8  # every A is another: of its layer, and of its key
