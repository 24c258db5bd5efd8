"""Which dimensions of a TPU slice the axes of a mesh lie on.

An axis on whole dimensions has all of their links for its collectives, and rings where dimensions
are closed. One that takes a part of a dimension shares its links with another axis.
"""

import dataclasses
import itertools
import math
from collections.abc import Sequence
from typing import Any

import numpy as np
from jax.experimental import mesh_utils
from jax.sharding import Mesh

# Of a device's position. "core" counts the devices of a chip, "slice" the slices.
DIMENSION_NAMES = ("x", "y", "z", "core", "slice")


@dataclasses.dataclass(frozen=True)
class DimensionShare:
    """What a mesh axis has of a dimension of the slice."""

    name: str  # one of `DIMENSION_NAMES`
    used: int  # positions along the dimension that one group of the axis has
    size: int  # positions along the dimension

    def __str__(self):
        return f"{self.name}({self.size if self.is_whole else f'{self.used} of {self.size}'})"

    @property
    def is_whole(self) -> bool:
        return self.used == self.size


def arrange_devices(shape: Sequence[int], devices: Sequence[Any]) -> np.ndarray:
    """Return the devices of one slice as an array, with axes on whole dimensions if possible.

    Args:
      shape: sizes of the mesh axes, those that exchange most last.
      devices: all devices of the slice.
    """
    try:
        return mesh_utils.create_device_mesh(list(shape), devices)
    except NotImplementedError:
        # JAX gives each axis, the last one first, as many dimensions as it can. What is left may
        # then not fit the others, though another choice does.
        pass
    physical = _physical_array(devices)
    whole = find_whole_axes(shape, physical.shape) if physical is not None else None
    if physical is None or whole is None:
        return mesh_utils.create_device_mesh(list(shape), devices, allow_split_physical_axes=True)
    order = [dim for dims in whole for dim in dims]
    # A dimension of 1 belongs to no axis.
    order += [dim for dim in range(physical.ndim) if dim not in order]
    return physical.transpose(order).reshape(shape)


def find_whole_axes(
    shape: Sequence[int], physical_shape: Sequence[int]
) -> tuple[tuple[int, ...], ...] | None:
    """Return the dimensions of each mesh axis, every dimension whole, or None where that cannot be.

    Of several ways it takes the one that gives the last axes most dimensions.

    Args:
      shape: sizes of the mesh axes.
      physical_shape: sizes of the dimensions.
    """
    dims = [dim for dim, size in enumerate(physical_shape) if size > 1]
    axes = [axis for axis, size in enumerate(shape) if size > 1]
    best, best_rank = None, None
    for owners in itertools.product(axes, repeat=len(dims)):
        owned = tuple(
            tuple(dim for dim, owner in zip(dims, owners, strict=True) if owner == axis)
            for axis in range(len(shape))
        )
        sizes = [math.prod(physical_shape[dim] for dim in axis_dims) for axis_dims in owned]
        rank = [len(axis_dims) for axis_dims in reversed(owned)]
        if sizes == list(shape) and (best_rank is None or rank > best_rank):
            best, best_rank = owned, rank
    return best


def describe_axes(mesh: Mesh) -> dict[str, tuple[DimensionShare, ...]]:
    """Return what each mesh axis of several devices has of the slice. {} for other devices."""
    positions = [_position(device) for device in mesh.devices.flat]
    if None in positions:
        return {}
    coordinates = np.array(positions).reshape(*mesh.devices.shape, len(DIMENSION_NAMES))
    sizes = [len(np.unique(coordinates[..., dim])) for dim in range(len(DIMENSION_NAMES))]
    shares = {}
    for number, axis in enumerate(mesh.axis_names):
        if mesh.devices.shape[number] == 1:
            continue
        # One group of the axis: all groups are alike.
        line = np.moveaxis(coordinates, number, 0).reshape(mesh.devices.shape[number], -1, 5)[:, 0]
        shares[axis] = tuple(
            DimensionShare(name, used, size)
            for name, used, size in zip(
                DIMENSION_NAMES, (len(np.unique(column)) for column in line.T), sizes, strict=True
            )
            if used > 1
        )
    return shares


def _position(device: Any) -> tuple[int, ...] | None:
    """Return a device's position along `DIMENSION_NAMES`, or None for what is no TPU."""
    coords = getattr(device, "coords", None)
    if coords is None:
        return None
    return (*coords, device.core_on_chip, getattr(device, "slice_index", 0))


def _physical_array(devices: Sequence[Any]) -> np.ndarray | None:
    """Return the devices by position, or None where they are no whole box of TPUs."""
    positions = [_position(device) for device in devices]
    if None in positions:
        return None
    coordinates = np.array(positions)
    coordinates = coordinates - coordinates.min(axis=0)
    physical_shape = coordinates.max(axis=0) + 1
    if math.prod(physical_shape) != len(devices):
        return None
    physical = np.empty(physical_shape, object)
    for device, position in zip(devices, coordinates, strict=True):
        physical[tuple(position)] = device
    return physical
