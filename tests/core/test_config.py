"""Options of the mesh and of processes that can not be, all named at once."""

from __future__ import annotations

import pytest

from droplora_jax.core.config import DistributedConfig, MeshConfig
from droplora_jax.core.errors import InputError


@pytest.mark.parametrize("sizes", [{"data": 0}, {"fsdp": -2}])
def test_sizes_must_be_positive_or_minus_one(sizes):
    with pytest.raises(InputError, match=r"^(data=0|fsdp=-2): must be positive"):
        MeshConfig(**sizes)


def test_only_one_axis_may_be_minus_one():
    with pytest.raises(InputError, match=r"^data=-1: only one axis may be -1 .*, and fsdp is too"):
        MeshConfig(data=-1, fsdp=-1, tensor=1)


def test_all_problems_of_a_configuration_are_named_at_once():
    with pytest.raises(InputError) as caught:
        MeshConfig(data=0, tensor=-3)
    assert [problem.partition(":")[0] for problem in caught.value.problems] == [
        "data=0",
        "tensor=-3",
    ]
    with pytest.raises(InputError) as caught:
        DistributedConfig("host", num_processes=0, process_id=1, timeout=9)
    assert [problem.partition("=")[0] for problem in caught.value.problems] == [
        "coordinator",
        "num_processes",
        "timeout",
    ]
    with pytest.raises(InputError, match=r"^num_processes is missing: [^\n]*$"):
        DistributedConfig("host:1", process_id=1)
