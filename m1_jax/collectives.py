"""Collectives by logical axis: `jax.lax`'s own, over the mesh axes that split a logical axis.

They work inside of `sharding.run_sharded`, where every mesh axis is manual. Outside of it, and over
axes of one device, they return their argument. The same model code therefore runs on one device.
"""

import math

import jax
import jax.numpy as jnp
from jaxtyping import Array, Shaped

from m1_jax import sharding


def mesh_axes(logical: str) -> tuple[str, ...]:
    """Return the mesh axes, of more than one device each, that split this logical axis."""
    # The mesh of the `shard_map` that is being traced. Outside of one it has no manual axes.
    mesh = jax.sharding.get_abstract_mesh()
    return tuple(
        axis
        for axis in sharding.ACTIVATION_RULES[logical]
        if axis in mesh.manual_axes and mesh.shape[axis] > 1
    )


def axis_size(logical: str) -> int:
    """Return over how many devices a logical axis is split."""
    mesh = jax.sharding.get_abstract_mesh()
    return math.prod(mesh.shape[axis] for axis in mesh_axes(logical))


def axis_index(logical: str) -> jax.Array | int:
    """Return which slice of a logical axis this device holds."""
    axes = mesh_axes(logical)
    return jax.lax.axis_index(axes) if axes else 0


def psum(x: Shaped[Array, "..."], logical: str) -> Shaped[Array, "..."]:
    """Add up the devices' values."""
    axes = mesh_axes(logical)
    return jax.lax.psum(x, axes) if axes else x


def pmax(x: Shaped[Array, "..."], logical: str) -> Shaped[Array, "..."]:
    """Take the largest of the devices' values. It has no gradient."""
    axes = mesh_axes(logical)
    return jax.lax.pmax(x, axes) if axes else x


def all_gather_stacked(x: Shaped[Array, "*shape"], logical: str) -> Shaped[Array, "P *shape"]:
    """Return every device's value, stacked on a new leading axis."""
    axes = mesh_axes(logical)
    # The result has the new axis on one device too, so that callers need no second case.
    return jax.lax.all_gather(x, axes) if axes else x[None]


def all_gather(x: Shaped[Array, "..."], logical: str, dim: int) -> Shaped[Array, "..."]:
    """Return the full array, of which each device holds a slice of dimension `dim`."""
    axes = mesh_axes(logical)
    return jax.lax.all_gather(x, axes, axis=dim, tiled=True) if axes else x


def psum_scatter(x: Shaped[Array, "..."], logical: str, dim: int) -> Shaped[Array, "..."]:
    """Add up the devices' values, and return this device's slice of dimension `dim`."""
    axes = mesh_axes(logical)
    return jax.lax.psum_scatter(x, axes, scatter_dimension=dim, tiled=True) if axes else x


def local_slice(x: Shaped[Array, "..."], logical: str, dim: int) -> Shaped[Array, "..."]:
    """Return this device's slice of an array that every device holds in full."""
    num_devices = axis_size(logical)
    if num_devices == 1:
        return x
    size = x.shape[dim] // num_devices
    # Over several mesh axes the last one counts fastest, as in a `PartitionSpec`.
    return jax.lax.dynamic_slice_in_dim(x, axis_index(logical) * size, size, dim)


def ppermute_next(x: Shaped[Array, "..."], logical: str) -> Shaped[Array, "..."]:
    """Send the value to the next device along the axis, the last device's to the first.

    The axis must be split over exactly one mesh axis.
    """
    (axis,) = mesh_axes(logical)
    num_devices = axis_size(logical)
    return jax.lax.ppermute(x, axis, [(i, (i + 1) % num_devices) for i in range(num_devices)])


def all_to_all(
    x: Shaped[Array, "..."], axes: tuple[str, ...], split_dim: int, concat_dim: int
) -> Shaped[Array, "..."]:
    """Cut `split_dim` into a part for each device, and concatenate the parts received.

    It takes mesh axes, as `MeshLayout.fsdp_dim_and_axes` returns them, and not a logical axis.
    """
    return jax.lax.all_to_all(x, axes, split_dim, concat_dim, tiled=True) if axes else x


def permute_zigzag(
    x: Shaped[Array, "..."], logical: str, dim: int, inverse: bool = False
) -> Shaped[Array, "..."]:
    """Give each device an early and a late half slice, so that causal work is spread evenly.

    The P slices of `dim` are 2 P halves, of which device d gets d and 2 P - 1 - d (in an order that
    depends on d). `inverse` undoes that.
    """
    (axis,) = mesh_axes(logical)
    num_devices = axis_size(logical)
    halves = []
    # Device d holds halves 2 d and 2 d + 1. Half h < P belongs to device h, any other to
    # 2 P - 1 - h. Among all first halves no two go to one device, nor among all second halves, so
    # two permutations do it.
    for parity, half in enumerate(jnp.split(x, 2, axis=dim)):
        moves = [
            (d, min(2 * d + parity, 2 * num_devices - 1 - (2 * d + parity)))
            for d in range(num_devices)
        ]
        if inverse:
            moves = [(target, source) for source, target in moves]
        halves.append(jax.lax.ppermute(half, axis, moves))
    return jnp.concatenate(halves, axis=dim)
