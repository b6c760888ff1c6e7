from __future__ import annotations

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.sharding import PartitionSpec as P

from droplora_jax.errors import InputError
from droplora_jax.models.decoder import LOGICAL_AXES
from droplora_jax.sharding import (
    RULES,
    MeshConfig,
    constrain,
    make_mesh,
    named_sharding,
    partition_spec,
    put,
)


@pytest.mark.parametrize(
    ("config", "shape"),
    [
        (None, (1, 8, 1)),
        (MeshConfig(), (1, 8, 1)),
        (MeshConfig(2, 2, 2), (2, 2, 2)),
        (MeshConfig(2, -1, 2), (2, 2, 2)),
        (MeshConfig(-1, 2, 1), (4, 2, 1)),
        (MeshConfig(1, 4, -1), (1, 4, 2)),
    ],
)
def test_minus_one_takes_what_is_left(config, shape):
    mesh = make_mesh(config)
    assert mesh.axis_names == ("data", "fsdp", "tensor")
    assert mesh.devices.shape == shape
    assert len(set(mesh.devices.flat)) == 8


def test_a_mesh_of_some_devices():
    assert list(make_mesh(devices=jax.devices()[:1]).devices.flat) == jax.devices()[:1]


@pytest.mark.parametrize(
    "config", [MeshConfig(3, -1, 1), MeshConfig(2, 2, 1), MeshConfig(16, -1, 1)]
)
def test_sizes_that_do_not_multiply_say_what_was_asked_and_what_there_is(config):
    with pytest.raises(InputError, match=rf"data={config.data}.*8 device"):
        make_mesh(config)


@pytest.mark.parametrize("sizes", [(0, 1, 1), (1, -2, 1)])
def test_sizes_must_be_positive_or_minus_one(sizes):
    with pytest.raises(InputError, match=r"mesh\.(data=0|fsdp=-2)"):
        MeshConfig(*sizes)


def test_only_one_axis_may_be_minus_one():
    with pytest.raises(InputError, match="only one"):
        MeshConfig(-1, -1, 1)


def test_logical_axes_to_mesh_axes():
    mesh = make_mesh(MeshConfig(2, 2, 2))
    assert partition_spec(("batch", None, "vocab"), mesh) == P(("data", "fsdp"), None, ("tensor",))
    assert partition_spec(("width", "heads"), mesh) == P(("fsdp",), ("tensor",))
    # 3 heads on 2 devices: that dimension alone is left whole.
    assert partition_spec(("width", "heads"), mesh, (4, 3)) == P(("fsdp",), None)
    assert partition_spec(("batch", None), mesh, (6, 1)) == P(None, None)


def test_unknown_axes_and_collisions_are_errors():
    mesh = make_mesh()
    with pytest.raises(InputError, match=r"'wdith'.*width"):
        partition_spec(("wdith",), mesh)
    with pytest.raises(InputError, match="twice"):
        partition_spec(("heads", "ffn"), mesh)
    with pytest.raises(InputError, match="twice"):
        partition_spec(("batch", "width"), mesh)


def test_every_parameter_of_the_decoder_has_a_rule_without_collisions():
    mesh = make_mesh(MeshConfig(2, 2, 2))
    for axes in LOGICAL_AXES.values():
        assert set(axes) <= RULES.keys()
        partition_spec(axes, mesh)


def test_constrain_places_an_array_and_does_nothing_on_one_device():
    mesh = make_mesh(MeshConfig(2, 2, 2))
    x = jnp.arange(32.0).reshape(4, 8)
    y = jax.jit(lambda x: constrain(x, ("batch", "vocab"), mesh))(x)
    assert y.sharding.is_equivalent_to(named_sharding(mesh, ("batch", "vocab")), 2)
    np.testing.assert_array_equal(x, y)
    assert constrain(x, ("batch", None), None) is x
    assert constrain(x, ("batch", None), make_mesh(devices=jax.devices()[:1])) is x


def test_put_shards_rows_and_keeps_values():
    mesh = make_mesh(MeshConfig(2, 2, 2))
    tree = {"tokens": np.arange(64).reshape(8, 8), "rows": np.arange(8)}
    placed = put(tree, ("batch",), mesh)
    for name, value in tree.items():
        np.testing.assert_array_equal(placed[name], value)
        assert placed[name].addressable_shards[0].data.shape[0] == 2
        for shard in placed[name].addressable_shards:
            np.testing.assert_array_equal(shard.data, value[shard.index])
    batched = put({"tokens": np.zeros((3, 8, 5))}, (None, "batch"), mesh)["tokens"]
    assert batched.addressable_shards[0].data.shape == (3, 2, 5)
