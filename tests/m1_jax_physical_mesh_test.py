"""Axes of meshes on the dimensions of TPU slices, from topologies of the compiler."""

import pytest

from m1_jax import physical_mesh, sharding
from m1_jax.plan import meshes, topology


def make_mesh(name, sizes):
    pytest.importorskip("libtpu")
    tpu_slice = topology.parse_slice(name)
    return sharding.make_mesh(sizes, topology.get_slice_devices(tpu_slice)), tpu_slice


@pytest.mark.parametrize(
    ("name", "sizes", "dimensions"),
    [
        ("v5p:4x8x16", {"fsdp": 16, "expert": 32}, {"fsdp": "z(16)", "expert": "x(4) y(8)"}),
        (
            "v5p:8x8x8",
            {"fsdp": 16, "expert": 32},
            {"fsdp": "y(2 of 8) z(8)", "expert": "x(8) y(4 of 8)"},
        ),
        # JAX alone would give tensor x and y, and cut z for the other two.
        (
            "v5p:4x4x16",
            {"fsdp": 4, "expert": 4, "tensor": 16},
            {"fsdp": "x(4)", "expert": "y(4)", "tensor": "z(16)"},
        ),
        ("v6e:8x16", {"expert": 16, "tensor": 8}, {"expert": "y(16)", "tensor": "x(8)"}),
        ("tpu7x:4x4x8", {"fsdp": 8, "expert": 32}, {"fsdp": "z(8)", "expert": "x(4) y(4) core(2)"}),
    ],
)
def test_axes_lie_on_whole_dimensions_where_they_can(name, sizes, dimensions):
    mesh, tpu_slice = make_mesh(name, sizes)
    shares = physical_mesh.describe_axes(mesh)
    assert {axis: " ".join(map(str, parts)) for axis, parts in shares.items()} == dimensions
    assert len(set(mesh.devices.flat)) == tpu_slice.num_devices
    warnings = meshes.describe_cut_axes(mesh, tpu_slice)
    assert len(warnings) == sum("of" in text for text in dimensions.values())
    for warning in warnings:
        assert "of 8 chips of y" in warning
        assert warning.endswith("of as many chips, v5p:4x8x16 has them")


def test_orders_that_jax_has_for_small_slices_are_no_fault():
    assert meshes.describe_cut_axes(*make_mesh("v5e:2x4", {"fsdp": 2, "expert": 4})) == []


def test_other_devices_have_no_dimensions():
    mesh = sharding.make_mesh({"fsdp": 2, "expert": 4})
    assert physical_mesh.describe_axes(mesh) == {}


@pytest.mark.parametrize(
    ("shape", "physical_shape", "axes"),
    [
        ((1, 16, 32), (4, 8, 16), ((), (2,), (0, 1))),
        ((4, 4, 16), (4, 4, 16), ((0,), (1,), (2,))),
        ((4, 16), (4, 4, 4), ((2,), (0, 1))),  # the last axis has most dimensions
        ((2, 4), (1, 2, 4), ((1,), (2,))),
        ((16, 32), (8, 8, 8), None),
        ((1, 1), (1, 1, 1), ((), ())),
    ],
)
def test_whole_axes(shape, physical_shape, axes):
    found = physical_mesh.find_whole_axes(shape, physical_shape)
    if axes is None:
        assert found is None
    else:
        assert [len(dims) for dims in found] == [len(dims) for dims in axes]
        products = [[physical_shape[dim] for dim in dims] for dims in found]
        assert products == [[physical_shape[dim] for dim in dims] for dims in axes]


@pytest.mark.parametrize(
    ("name", "closed"),
    [
        ("v5p:8x8x8", (True, True, True)),
        ("v5p:4x8x16", (True, True, True)),
        ("v5p:2x4x4", (False, False, False)),  # less than a cube
        ("tpu7x:4x4x8", (True, True, True)),
        ("tpu7x:2x2x1", (False, False, False)),
        ("v5e:16x16", (True, True)),
        ("v5e:8x16", (False, True)),
        ("v6e:8x8", (False, False)),
    ],
)
def test_closed_dimensions(name, closed):
    pytest.importorskip("libtpu")
    tpu_slice = topology.parse_slice(name)
    assert tpu_slice.closed_dims == closed
    assert len(topology.get_slice_devices(tpu_slice)) == tpu_slice.num_devices
