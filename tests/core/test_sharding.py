from __future__ import annotations

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.sharding import PartitionSpec as P

from droplora_jax.core.config import MeshConfig
from droplora_jax.core.errors import InputError
from droplora_jax.core.sharding import (
    RULES,
    _ordered,
    constrain,
    make_mesh,
    named_sharding,
    partition_spec,
    put,
)
from droplora_jax.models.parameter_table import LOGICAL_AXES


@pytest.mark.parametrize(
    ("config", "shape"),
    [
        (None, (1, 1, 8, 1, 1)),
        (MeshConfig(), (1, 1, 8, 1, 1)),
        (MeshConfig(data=2, fsdp=2, tensor=2), (1, 2, 2, 2, 1)),
        (MeshConfig(data=-1, fsdp=2), (1, 4, 2, 1, 1)),
        (MeshConfig(fsdp=4, tensor=-1), (1, 1, 4, 2, 1)),
        (MeshConfig(replica=2, context=2), (2, 1, 2, 1, 2)),
        (MeshConfig(replica=-1, fsdp=1, context=4), (2, 1, 1, 1, 4)),
    ],
)
def test_minus_one_takes_what_is_left(config, shape):
    mesh = make_mesh(config)
    assert mesh.axis_names == ("replica", "data", "fsdp", "tensor", "context")
    assert mesh.devices.shape == shape
    assert len(set(mesh.devices.flat)) == 8


class Chip:
    """A device of a slice, as the mesh's maker sees one."""

    def __init__(self, number: int, slice_index: int, platform: str) -> None:
        self.id, self.slice_index, self.process_index = number, slice_index, slice_index
        self.platform = self.device_kind = platform
        self.coords, self.core_on_chip = (number // 2, 0, 0), 0


@pytest.mark.parametrize("platform", ["tpu", "gpu"])
def test_replicas_lie_across_slices(platform):
    chips = [Chip(i, i % 2, platform) for i in range(8)]
    devices = _ordered((4, 1, 2, 1, 1), chips)
    assert devices.shape == (4, 1, 2, 1, 1)
    assert len({chip.id for chip in devices.flat}) == 8
    of_slice = np.vectorize(lambda chip: chip.slice_index)(devices).reshape(4, 2)
    assert of_slice.tolist() == [[0, 0], [0, 0], [1, 1], [1, 1]]


def test_on_tpus_only_replicas_lie_across_slices():
    """On GPUs what is called a slice is a host, and its network fast enough for weights."""
    sizes = (1, 1, 8, 1, 1)
    with pytest.raises(InputError, match=r"mesh.replica=1: .* 2 slices.*multiple of 2"):
        _ordered(sizes, [Chip(i, i % 2, "tpu") for i in range(8)])
    assert _ordered(sizes, [Chip(i, i % 2, "gpu") for i in range(8)]).shape == sizes


def test_a_mesh_of_some_devices():
    assert list(make_mesh(devices=jax.devices()[:1]).devices.flat) == jax.devices()[:1]


@pytest.mark.parametrize(
    "config", [MeshConfig(data=3), MeshConfig(data=2, fsdp=2), MeshConfig(data=16)]
)
def test_sizes_that_do_not_multiply_say_what_was_asked_and_what_there_is(config):
    with pytest.raises(InputError, match=rf"data={config.data}.*8 device"):
        make_mesh(config)


def test_logical_axes_to_mesh_axes():
    mesh = make_mesh(MeshConfig(data=2, fsdp=2, tensor=2))
    assert partition_spec(("batch", None, "vocab"), mesh) == P(
        ("replica", "data", "fsdp"), None, ("tensor",)
    )
    width = ("fsdp", "context")
    assert partition_spec(("width", "heads"), mesh) == P(width, ("tensor",))
    # 3 heads on 2 devices: that dimension alone is left whole.
    assert partition_spec(("width", "heads"), mesh, (4, 3)) == P(width, None)
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
    mesh = make_mesh(MeshConfig(data=2, fsdp=2, tensor=2))
    for axes in LOGICAL_AXES.values():
        assert set(axes) <= RULES.keys()
        partition_spec(axes, mesh)


def test_constrain_places_an_array_and_does_nothing_on_one_device():
    mesh = make_mesh(MeshConfig(data=2, fsdp=2, tensor=2))
    x = jnp.arange(32.0).reshape(4, 8)
    y = jax.jit(lambda x: constrain(x, ("batch", "vocab"), mesh))(x)
    assert y.sharding.is_equivalent_to(named_sharding(mesh, ("batch", "vocab")), 2)
    np.testing.assert_array_equal(x, y)
    assert constrain(x, ("batch", None), None) is x
    assert constrain(x, ("batch", None), make_mesh(devices=jax.devices()[:1])) is x


def test_put_shards_rows_and_keeps_values():
    mesh = make_mesh(MeshConfig(data=2, fsdp=2, tensor=2))
    tree = {"tokens": np.arange(64).reshape(8, 8), "rows": np.arange(8)}
    placed = put(tree, ("batch",), mesh)
    for name, value in tree.items():
        np.testing.assert_array_equal(placed[name], value)
        assert placed[name].addressable_shards[0].data.shape[0] == 2
        for shard in placed[name].addressable_shards:
            np.testing.assert_array_equal(shard.data, value[shard.index])
    batched = put({"tokens": np.zeros((3, 8, 5))}, (None, "batch"), mesh)["tokens"]
    assert batched.addressable_shards[0].data.shape == (3, 2, 5)
