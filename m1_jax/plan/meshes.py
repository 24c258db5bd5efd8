"""Meshes of a slice: read from --mesh, checked against a job, or searched and ranked."""

import math
from collections.abc import Iterator, Sequence
from typing import Any

import numpy as np
from jax.sharding import Mesh

from m1_jax import command_mesh, logprobs, physical_mesh, sharding
from m1_jax import config as config_lib
from m1_jax import model as model_lib
from m1_jax import params as params_lib
from m1_jax.plan import config as plan_config
from m1_jax.plan import estimate, jobs, topology

# What a search splits devices over, by kind of job or mode.
_SEARCHED_AXES = {
    sharding.TRAIN: ("fsdp", "expert", "tensor", "context"),
    sharding.PREFILL: ("data", "expert", "tensor", "context"),
    sharding.DECODE: ("data", "expert", "tensor", "context"),
    "serve": ("data", "expert", "tensor"),
}
_SEARCHED_AXES["rl_update"] = _SEARCHED_AXES[sharding.TRAIN]


def parse_mesh(text: str, num_devices: int) -> dict[str, int]:
    """Read axis=size,axis=size. A size may be -1: all devices that remain.

    Raises:
      PlanError: an unknown axis, a size that is none, or sizes that do not make all devices.
    """
    try:
        shape = command_mesh.parse_axis_sizes(text)
    except ValueError as error:
        raise plan_config.PlanError(str(error)) from None
    for axis in [axis for axis, size in shape.items() if size == -1]:  # one at most
        shape[axis] = max(num_devices // -math.prod(shape.values()), 1)
    if math.prod(shape.values()) != num_devices:
        raise plan_config.PlanError(
            f"mesh: {text} makes {math.prod(shape.values())} devices; wanted {num_devices}, "
            "all of the topology"
        )
    return shape


def make_job_layout(
    config: config_lib.ModelConfig,
    mesh_shape: dict[str, int],
    devices: Sequence[Any],
    job: estimate.PlanJob,
) -> sharding.MeshLayout:
    """Return the layout of a job on a mesh.

    Raises:
      ValueError: the model, the rows or the length cannot be split so.
    """
    layout = sharding.make_layout(sharding.make_mesh(mesh_shape, devices), config, job.mode)
    assert layout is not None
    _check_job_layout(job, layout)
    return layout


def describe_padded_columns(
    config: config_lib.ModelConfig,
    job: estimate.PlanJob,
    layout: sharding.MeshLayout,
    model: model_lib.MiniMaxM1,
) -> list[str]:
    """Return a warning for each kind of expert whose columns do not fill a chip's tiles.

    Columns below one tile are those of small test models, and always padded.
    """
    warnings, num_shards = [], layout.axis_size("mlp")
    for field in ("intermediate_size", "shared_intermediate_size"):
        size = getattr(config, field)
        columns = size // num_shards
        if columns < logprobs.TILE_LANES or columns % logprobs.TILE_LANES == 0:
            continue
        tiles = size // logprobs.TILE_LANES
        good = [str(n) for n in range(1, tiles + 1) if size % logprobs.TILE_LANES == tiles % n == 0]
        copied = padded_copy_bytes(config, job, layout, model) / 2**30
        warnings.append(
            f"mesh: {field} {size} over tensor={num_shards} leaves {columns} columns on a chip; "
            f"wanted a multiple of {logprobs.TILE_LANES}, because the compiler copies other "
            "matrices into padded ones"
            + (f" (about {copied:.1f} GiB a chip here)" if copied else "")
            + (f". Make tensor one of {', '.join(good)}" if good else ". No tensor axis makes one")
        )
    return warnings


def describe_cut_axes(mesh: Mesh, tpu_slice: topology.TpuSlice) -> list[str]:
    """Return a warning for each mesh axis that shares a dimension of the slice with another."""
    warnings = []
    other = topology.find_slice_of_whole_axes(tpu_slice, list(mesh.shape.values()))
    if other == tpu_slice:  # JAX has orders of its own for some small slices, with rings
        return []
    for axis, shares in physical_mesh.describe_axes(mesh).items():
        cut = [share for share in shares if not share.is_whole]
        if cut:
            parts = [f"{share.used} of {share.size} chips of {share.name}" for share in cut]
            warnings.append(
                f"mesh: {axis}={mesh.shape[axis]} has {' and '.join(parts)}, whose links it shares "
                "with another axis; wanted whole dimensions"
                + (f": of as many chips, {other.name} has them" if other else "")
            )
    return warnings


def padded_copy_bytes(
    config: config_lib.ModelConfig,
    job: estimate.PlanJob,
    layout: sharding.MeshLayout,
    model: model_lib.MiniMaxM1,
) -> float:
    """Return the bytes on a chip of padded copies of all layers' experts.

    Only the serving engine has them: its products take experts out of the whole stack. Elsewhere
    one layer's experts exist at a time.
    """
    columns = config.intermediate_size // layout.axis_size("mlp")
    padding = -columns % logprobs.TILE_LANES
    if job.kind != "serve" or columns < logprobs.TILE_LANES or not padding:
        return 0.0
    total = 0.0
    for param in params_lib.params_by_path(model).values():
        names = param.get_metadata()["logical_axes"]
        if "experts" in names and names[-1] == "mlp":
            shard_shape = layout.param_sharding(names).shard_shape(param.shape)
            total += math.prod(shard_shape) * param.dtype.itemsize * (1 + padding / columns)
    return total


def rank_meshes(
    config: config_lib.ModelConfig,
    job: estimate.PlanJob,
    devices: Sequence[Any],
    num_slices: int,
    limit_bytes: float,
    model: model_lib.MiniMaxM1,
) -> list[dict[str, int]]:
    """Return the meshes that should fit, cheapest first. If none should, the least too large.

    Args:
      limit_bytes: HBM of a device.
      model: the job's model of shapes, on no mesh yet.

    Raises:
      PlanError: there are none.
    """
    ranked: list[tuple[tuple[bool, bool, float], dict[str, int]]] = []
    for mesh_shape in iterate_meshes(config, job, devices, num_slices):
        layout = make_job_layout(config, mesh_shape, devices, job)
        resources = jobs.estimate_job(config, job, layout, model)
        padded_bytes = padded_copy_bytes(config, job, layout, model)
        total_bytes = resources.total_bytes + padded_bytes
        is_over = total_bytes > limit_bytes
        # A mesh that is too large is compiled only if all are. The estimate may be wrong by a bit.
        cost = total_bytes if is_over else resources.cost(job)
        # Copies cost time in every program, which no estimate has.
        ranked.append(((is_over, bool(padded_bytes), cost), mesh_shape))
    if not ranked:
        raise plan_config.PlanError(
            f"no mesh of {len(devices)} devices divides {job.batch} rows of {job.seq} tokens "
            f"in {job.accumulate} microbatches; choose another --batch, or give --mesh"
        )
    ranked.sort(key=lambda pair: pair[0])  # dicts have no order
    return [shape for (is_over, *_), shape in ranked if not is_over] or [ranked[0][1]]


def iterate_meshes(
    config: config_lib.ModelConfig,
    job: estimate.PlanJob,
    devices: Sequence[Any],
    num_slices: int = 1,
) -> Iterator[dict[str, int]]:
    """Yield every mesh of all devices that the model, rows and length can lie on."""
    axes = _SEARCHED_AXES[job.kind]
    for sizes in _iterate_factorizations(len(devices) // num_slices, len(axes)):
        # One slice has nothing to cross, so any one axis will do for a factor of 1.
        for cross_axis in sharding.CROSS_SLICE_AXES if num_slices > 1 else sharding.MESH_AXES[:1]:
            mesh_shape = dict(zip(axes, sizes, strict=True))
            mesh_shape[cross_axis] = mesh_shape.get(cross_axis, 1) * num_slices
            full_shape = [mesh_shape.get(axis, 1) for axis in sharding.MESH_AXES]
            # Not `sharding.make_mesh`: it arranges devices by their links, and the order does not
            # matter to sizes. Hundreds of meshes are tried here.
            mesh = Mesh(np.array(devices).reshape(full_shape), sharding.MESH_AXES)
            try:
                layout = sharding.make_layout(mesh, config, job.mode)
                assert layout is not None
                _check_job_layout(job, layout)
            except ValueError:
                continue
            yield {axis: size for axis, size in mesh_shape.items() if size > 1}


def _check_job_layout(job: estimate.PlanJob, layout: sharding.MeshLayout) -> None:
    """Raise ValueError for rows or lengths that the layout does not split evenly."""
    if job.kind == "reshard":  # it has no rows
        return
    sharding.check_batch_rows(layout, job.batch // job.accumulate)
    if job.seq % layout.axis_size("length"):
        raise ValueError(
            f"seq: got {job.seq} tokens over context={layout.axis_size('length')}; wanted a "
            f"multiple of {layout.axis_size('length')}"
        )


def _iterate_factorizations(product: int, num_factors: int) -> Iterator[tuple[int, ...]]:
    """Yield every way to write `product` as a product of ordered factors."""
    if num_factors == 1:
        yield (product,)
        return
    for first in range(1, product + 1):
        if product % first == 0:
            for factors in _iterate_factorizations(product // first, num_factors - 1):
                yield (first, *factors)
