"""Devices of several slices, which have a slower network between them, in one mesh."""

import dataclasses

import numpy as np
import pytest

from omnicodec_jax.config import MeshConfig
from omnicodec_jax.distributed import sharding
from omnicodec_jax.errors import ConfigError

pytestmark = pytest.mark.quick


@dataclasses.dataclass(frozen=True)
class FakeDevice:
    """What the arrangement of devices asks of one."""

    id: int
    slice_index: int
    process_index: int = 0
    platform: str = "none"
    device_kind: str = "none"


MIXED = [FakeDevice(id=10 * number + place, slice_index=number) for place in range(4) for number in (1, 0)]
"""Eight devices of two slices, which do not come slice by slice."""


def slices(config: MeshConfig, devices: list[FakeDevice] = MIXED) -> np.ndarray:
    """The slice of each device of a mesh [data, fsdp, tensor]."""
    return np.vectorize(lambda device: device.slice_index)(sharding.make_mesh(config, devices).devices)


@pytest.mark.parametrize("axes", [{}, {"fsdp": 2}, {"fsdp": 4}, {"fsdp": 2, "tensor": 2}, {"slices": 2, "tensor": 4}])
def test_groups_that_share_a_state_stay_within_a_slice_and_data_is_spread_over_all(axes):
    found = slices(MeshConfig(**axes))
    assert found.shape == (8 // (found.shape[1] * found.shape[2]), axes.get("fsdp", 1), axes.get("tensor", 1))
    for group in found:
        assert len(set(group.ravel().tolist())) == 1
    assert found[:, 0, 0].tolist() == sorted([0, 1] * (len(found) // 2))


def test_group_that_does_not_fit_into_a_slice_is_refused_with_the_way_out():
    with pytest.raises(
        ConfigError, match=r"fsdp x tensor = 8 x 1 .* the 4 of each of the 2 slices; with run.mesh.slices = 1"
    ):
        sharding.make_mesh(MeshConfig(fsdp=8), MIXED)


def test_slower_network_may_count_as_any_other():
    assert slices(MeshConfig(slices=1, fsdp=8)).ravel().tolist() == [0, 0, 0, 0, 1, 1, 1, 1]


def test_number_of_slices_that_is_not_there_is_refused():
    with pytest.raises(ConfigError, match=r"run.mesh.slices = 3: the 8 devices are in 2 slice\(s\)"):
        sharding.make_mesh(MeshConfig(slices=3), MIXED)
    with pytest.raises(ConfigError, match=r"run.mesh.slices = 2: the 2 devices are in 1 slice\(s\)"):
        sharding.make_mesh(MeshConfig(slices=2), MIXED[1::4])


@dataclasses.dataclass(frozen=True)
class FakeTPU(FakeDevice):
    """A chip of a slice, as JAX describes it."""

    platform: str = "tpu"
    device_kind: str = "TPU v6 lite"
    coords: tuple[int, int, int] = (0, 0, 0)
    core_on_chip: int = 0


@pytest.mark.parametrize("kind", ["TPU v4", "TPU v5 lite", "TPU v5", "TPU v6 lite"])
@pytest.mark.parametrize("count", [1, 2])
@pytest.mark.parametrize("axes", [{"fsdp": 2}, {"tensor": 2}, {"fsdp": 16}, {"fsdp": 2, "tensor": 4}, {"fsdp": 8}])
def test_axis_may_be_a_part_of_a_side_of_the_slice(kind, count, axes):
    chips = [(x, y, 0) for y in range(8) for x in range(4)]
    devices = [
        FakeTPU(id=32 * number + place, slice_index=number, device_kind=kind, coords=chip)
        for number in range(count)
        for place, chip in enumerate(chips)
    ]
    mesh = sharding.make_mesh(MeshConfig(**axes), devices)
    assert (mesh.shape["fsdp"], mesh.shape["tensor"]) == (axes.get("fsdp", 1), axes.get("tensor", 1))
    assert sorted(device.id for device in mesh.devices.flat) == list(range(32 * count))


def test_slices_of_unequal_size_are_refused():
    with pytest.raises(ConfigError, match=r"the 2 slices have \[2, 4\] devices"):
        sharding.make_mesh(MeshConfig(), [*MIXED[::2], *MIXED[1::4]])
