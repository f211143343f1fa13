"""The mesh: what fits the devices, and what is said of what does not."""

import dataclasses
import itertools

import jax
import pytest
from jax.sharding import AxisType

from longctx import config
from longctx.errors import UsageError
from longctx.parallel import mesh


@pytest.mark.parametrize(
    ("sizes", "shape"),
    [
        (config.Mesh(), (8, 1, 1)),
        (config.Mesh(data=2, context=-1, model=2), (2, 2, 2)),
        (config.Mesh(data=1, context=8), (1, 8, 1)),
        (config.Mesh(data=1, context=3), (1, 3, 1)),  # the first three of eight
    ],
)
def test_make(sizes, shape):
    made = mesh.make(sizes)
    assert made.axis_names == ("data", "context", "model")
    assert made.devices.shape == shape
    assert set(made.axis_types) == {AxisType.Auto}  # jax.make_mesh itself would say Explicit
    assert {device.id for device in made.devices.flat} == set(range(made.devices.size))


@pytest.mark.parametrize(
    ("sizes", "shared", "shape"),
    [
        (config.Mesh(), {"data": 4}, (4, 1, 1)),  # the first four of eight
        (config.Mesh(), {"data": 6}, (6, 1, 1)),
        (config.Mesh(), {"data": 7}, (7, 1, 1)),
        (config.Mesh(), {"data": 11}, (1, 1, 1)),
        (config.Mesh(), {"data": 24, "context": 3}, (8, 1, 1)),
        (config.Mesh(data=2, context=-1), {"data": 2, "context": 6}, (2, 3, 1)),
        (config.Mesh(data=3, context=1), {"data": 4}, (3, 1, 1)),  # given: for others to refuse
    ],
)
def test_an_open_axis_takes_the_most_that_share_equally(sizes, shared, shape):
    assert mesh.make(sizes, shared=shared).devices.shape == shape


def test_several_processes_use_all_devices(monkeypatch):
    monkeypatch.setattr(jax, "process_count", lambda: 2)
    assert mesh.make(config.Mesh(), shared={"data": 16}).size == 8
    with pytest.raises(UsageError, match=r"uses 4 of 8 devices, .* batches multiples of mesh\.data"):
        mesh.make(config.Mesh(), shared={"data": 4})


@pytest.mark.parametrize(
    ("sizes", "told"),
    [
        (config.Mesh(data=-1, context=3), "there are 8 and the other axes take 3"),
        (config.Mesh(data=-1, context=16), "there are 8 and the other axes take 16"),
        (config.Mesh(data=4, context=2, model=2), "needs 16 devices and there are 8"),
    ],
)
def test_misfit_names_sizes_and_devices(sizes, told):
    with pytest.raises(UsageError, match=told) as error:
        mesh.make(sizes)
    assert f"data={sizes.data}, context={sizes.context}, model={sizes.model}" in str(error.value)


@dataclasses.dataclass(frozen=True)
class Chip:
    """One that is not here."""

    id: int
    coords: tuple[int, int, int]
    device_kind: str = "TPU v4"
    platform: str = "tpu"
    core_on_chip: int = 0
    process_index: int = 0


def test_a_torus_without_such_rings(caplog):
    """2 of a ring of 4 are no ring: they are taken all the same, and that is told. 3 are no part of it."""
    chips = [Chip(i, coords) for i, coords in enumerate(itertools.product(range(4), repeat=3))]
    assert mesh.make(config.Mesh(data=4, context=16), chips).devices.shape == (4, 16, 1)
    assert not caplog.records
    made = mesh.make(config.Mesh(data=2, context=32), chips)
    assert set(made.devices.flat) == set(chips)
    assert "data=2, context=32, model=1 takes parts of the sides of a torus of 4x4x4 chips" in caplog.text
    with pytest.raises(UsageError, match="data=2, context=3, model=1 cannot be laid over a torus of 1x2x4 chips"):
        mesh.make(config.Mesh(data=2, context=3), chips)


def test_devices_given():
    made = mesh.make(config.Mesh(), jax.devices()[4:6])
    assert made.devices.shape == (2, 1, 1)
    assert [device.id for device in made.devices.flat] == [4, 5]


def test_context_size():
    assert mesh.context_size() == 1
    with jax.set_mesh(mesh.make(config.Mesh(data=2, context=4))):
        assert mesh.context_size() == 4
        assert jax.jit(lambda x: x * mesh.context_size())(1) == 4
    assert mesh.context_size() == 1
