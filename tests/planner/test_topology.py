"""TPU slices by name."""

import pytest

from llava_jax.planner.topology import names, topology
from llava_jax.sharding import MeshShape


@pytest.mark.parametrize(
    ("name", "grid", "chips", "mesh"),
    [
        ("v4-8", (2, 2, 1), 4, MeshShape(fsdp=(2, 2))),  # names of v4 and v5p count cores
        ("v5p-128", (4, 4, 4), 64, MeshShape(fsdp=(4, 4, 4))),
        ("v5e-256", (16, 16), 256, MeshShape(fsdp=(16, 16))),
        ("v6e-1", (1, 1), 1, MeshShape(fsdp=(1,))),
        ("v6e-8", (2, 4), 8, MeshShape(fsdp=(2, 4))),
        ("2xv5e-256", (16, 16), 512, MeshShape(data=2, fsdp=(16, 16))),
        ("v5litepod-16", (4, 4), 16, MeshShape(fsdp=(4, 4))),  # as gcloud has it
        ("V5E-16", (4, 4), 16, MeshShape(fsdp=(4, 4))),
    ],
)
def test_a_slice_is_what_the_cloud_rents(name, grid, chips, mesh):
    found = topology(name)
    assert (found.grid, found.chips, found.mesh_shape()) == (grid, chips, mesh)


@pytest.mark.parametrize(
    ("name", "closed"),
    [
        ("v5e-256", True),
        ("v5e-128", False),  # 8×16: one axis is a line
        ("v6e-8", False),
        ("v5p-128", True),
        ("v5p-64", False),  # 2×4×4
        ("2xv5e-256", True),
    ],
)
def test_whose_axes_are_rings(name, closed):
    assert topology(name).closed is closed


@pytest.mark.parametrize(
    ("name", "axes"), [("v5p-8", 2), ("v5p-16", 3), ("v5e-4", 2), ("v6e-1", 0)]
)
def test_along_which_axes_it_has_neighbours(name, axes):
    assert topology(name).axes == axes


def test_every_slice_people_hold_has_a_name():
    assert {"v4-8", "v4-128", "v5e-4", "v5e-256", "v5p-8", "v5p-128", "v6e-1", "v6e-256"} <= set(
        names()
    )
    for name in names():
        assert topology(name).chips >= 1


@pytest.mark.parametrize(
    "name",
    [
        "v5p-4",
        "v5e-3",
        "v7x-8",
        "v5e",
        "v5e-",
        "0xv5e-4",
        "axv5e-4",
        "999xv5e-4",
        "v4-9",
        "v5e-١٦",
        "",
    ],
)
def test_other_names_are_refused_with_the_list(name):
    with pytest.raises(ValueError, match=r"unknown TPU slice .*expected one of v4-8,.*v6e-256"):
        topology(name)
