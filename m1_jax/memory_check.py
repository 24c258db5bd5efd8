"""Whether a model and its working memory fit, found before a weight is read.

What is counted is what must be there: parameters and states, by their shapes and shardings.
Programs need temporary memory beside it, which only the compiler knows: `m1_jax.plan` asks it.
"""

import dataclasses
import math
import pathlib
from collections.abc import Callable, Iterator, Mapping
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import Mesh, NamedSharding

from m1_jax import config as config_lib
from m1_jax import model as model_lib
from m1_jax import params as params_lib
from m1_jax import sharding

GIB = 1 << 30
# A suggested slice is at most so full: the rest is for programs' temporary memory.
_SUGGESTED_SHARE = 0.8
_SLICES_2D = ("1x1", "2x2", "2x4", "4x4", "4x8", "8x8", "8x16", "16x16")
_SLICES_3D = ("2x2x1", "2x2x2", "2x2x4", "2x4x4", "4x4x4", "4x4x8", "4x8x8", "8x8x8", "8x8x16")
# By generation: HBM of a device that the compiler grants in GiB, devices of a chip, slices.
# The figures are those of docs/plan.md, by `m1_jax.plan`.
_GENERATIONS = {
    "v5e": (15.75, 1, _SLICES_2D),
    "v5p": (95.73, 1, _SLICES_3D),
    "v6e": (31.24, 1, _SLICES_2D),
    "tpu7x": (94.74, 2, _SLICES_3D),
}
# By the beginning of a device's kind, the longer names first.
_GENERATION_OF_KIND = {
    "TPU v5 lite": "v5e",
    "TPU v5e": "v5e",
    "TPU v5": "v5p",
    "TPU v6": "v6e",
    "TPU7x": "tpu7x",
}
_DEFAULT_GENERATION = "v5p"
# Where Linux keeps the limits of a container: newer and older control groups.
_CGROUP_FILES = (
    ("/sys/fs/cgroup/memory.max", "/sys/fs/cgroup/memory.current"),
    (
        "/sys/fs/cgroup/memory/memory.limit_in_bytes",
        "/sys/fs/cgroup/memory/memory.usage_in_bytes",
    ),
)


class MemoryCheckError(ValueError):
    """A model that cannot fit. The message has both numbers, and how to find a slice."""


@dataclasses.dataclass(frozen=True)
class MemoryJob:
    """What a command needs memory for, on any mesh.

    Attributes:
      name: the planner's name of it, such as "serve".
      mode: where parameters lie, such as `sharding.DECODE`.
      config: the model's config.
      checkpoint: the directory whose config.json the planner reads.
      rows: sequences side by side.
      tokens: tokens of a row.
      weights: the int8 recipe, or None.
      count_parts: returns the bytes of one device on a layout by part, such as "parameters". It
        takes a name of the dtype to compute in as well.
    """

    name: str
    mode: str
    config: config_lib.ModelConfig
    checkpoint: str
    rows: int
    tokens: int
    weights: str | None
    count_parts: Callable[[sharding.MeshLayout | None, str], Mapping[str, int]]


def check_memory(job: MemoryJob, layout: sharding.MeshLayout | None, dtype: str) -> None:
    """Compare what each device must hold with what it has. It reads no weights.

    A platform that tells no limits is not checked.

    Raises:
      MemoryCheckError: it cannot fit.
    """
    parts = job.count_parts(layout, dtype)
    device = jax.local_devices()[0]
    limit = device_limit_bytes(device)
    if limit is None:
        return
    needed, holder = sum(parts.values()), f"one {device.device_kind} device"
    if device.platform == "cpu":
        # Devices of the CPU share its memory.
        num_devices = 1 if layout is None else jax.local_device_count()
        needed, holder = needed * num_devices, "this host"
        parts = {name: size * num_devices for name, size in parts.items()}
    if needed <= limit:
        return
    listed = ", ".join(f"{name} {format_bytes(size)}" for name, size in parts.items())
    raise MemoryCheckError(
        f"memory: got {format_bytes(limit)} on {holder}; wanted {format_bytes(needed)} for "
        f"{dtype} ({listed}) before programs need any. {suggest_plan(job, device.device_kind)}"
    )


def format_bytes(size: float) -> str:
    """Return a size in GiB, or in MiB where it is smaller than one tenth of it."""
    if size < GIB / 10:
        return f"{size / (1 << 20):,.1f} MiB"
    return f"{size / GIB:,.1f} GiB"


def local_bytes(tree: Any, bfloat16_bytes: int = 2) -> int:
    """Return the bytes of a pytree of sharded shapes on one device.

    Args:
      bfloat16_bytes: bytes to count for each bfloat16 number. 4 counts shapes that were made for
        bfloat16 as for float32.
    """
    total = 0
    for leaf in jax.tree.leaves(tree):
        item_bytes = bfloat16_bytes if leaf.dtype == jnp.bfloat16 else leaf.dtype.itemsize
        total += math.prod(leaf.sharding.shard_shape(leaf.shape)) * item_bytes
    return total


def as_mesh_layout(layout: sharding.MeshLayout | None, mode: str) -> sharding.MeshLayout:
    """Return the layout, or for None one of the first device, where every shard is the whole."""
    if layout is not None:
        return layout
    return sharding.MeshLayout(sharding.make_mesh({}, jax.local_devices()[:1]), mode)


def shard_shapes(tree: Any, specs: Any, layout: sharding.MeshLayout) -> Any:
    """Return a pytree of shapes with the shardings of its specs, a tree of the same structure."""

    def add_sharding(shape: Any, spec: Any) -> Any:
        return jax.ShapeDtypeStruct(
            shape.shape, shape.dtype, sharding=NamedSharding(layout.mesh, spec)
        )

    return jax.tree.map(add_sharding, tree, specs)


def local_param_bytes(model: model_lib.MiniMaxM1, layout: sharding.MeshLayout | None) -> int:
    """Return the bytes of a model of shapes on one device, on a layout that need not be its own.

    Raises:
      ValueError: a dimension that the mesh does not divide.
    """
    total = 0
    for param in params_lib.params_by_path(model).values():
        value = param.get_value()
        param_sharding = sharding.make_param_sharding(
            layout, param.get_metadata()["logical_axes"], value.shape
        )
        total += math.prod(param_sharding.shard_shape(value.shape)) * value.dtype.itemsize
    return total


# ---- what there is


def device_limit_bytes(device: Any) -> int | None:
    """Return the memory of a device, or None where it tells none. A CPU has what the host has."""
    if device.platform == "cpu":
        return available_host_bytes()
    stats = device.memory_stats()
    return None if stats is None else stats.get("bytes_limit")


def available_host_bytes() -> int | None:
    """Return the memory that this process can still get, or None where nothing tells it."""
    limits = []
    for line in _read_lines("/proc/meminfo"):
        if line.startswith("MemAvailable:"):
            limits.append(int(line.split()[1]) * 1024)  # the file's unit is KiB
    for limit_file, usage_file in _CGROUP_FILES:
        limit, usage = _read_lines(limit_file), _read_lines(usage_file)
        # "max" is no limit. A control group counts the files that it has read as usage, too, but
        # gives them up first: what is in use is counted as /proc does it, by what cannot be freed.
        if limit and usage and limit[0].isdecimal():
            in_use = int(usage[0]) - _reclaimable_bytes(pathlib.Path(limit_file).parent)
            limits.append(max(int(limit[0]) - in_use, 0))
    return min(limits, default=None)


def _reclaimable_bytes(group: pathlib.Path) -> int:
    fields = dict(line.split() for line in _read_lines(str(group / "memory.stat")))
    return int(fields.get("inactive_file", 0)) + int(fields.get("active_file", 0))


def _read_lines(path: str) -> list[str]:
    try:
        return pathlib.Path(path).read_text().splitlines()
    except OSError:  # another system, or no control groups
        return []


# ---- where it would fit


def suggest_plan(job: MemoryJob, device_kind: str) -> str:
    """Return the `m1-plan` line that compiles the job on the smallest slice that should hold it."""
    generation = next(
        (g for kind, g in _GENERATION_OF_KIND.items() if device_kind.startswith(kind)),
        _DEFAULT_GENERATION,
    )
    limit_gib, devices_per_chip, slices = _GENERATIONS[generation]
    for shape in slices:
        num_devices = devices_per_chip * math.prod(map(int, shape.split("x")))
        found = _find_smallest_mesh(job, num_devices)
        if found is not None and found[0] <= _SUGGESTED_SHARE * limit_gib * GIB:
            break
    else:
        return f"No slice of {generation} holds it: take fewer rows, shorter ones, or --weights."
    _, mesh = found
    # The planner's rows are split over the axes of the batch.
    batch_axes = math.prod(mesh.get(axis, 1) for axis in sharding.ACTIVATION_RULES["batch"])
    batch = -(-job.rows // batch_axes) * batch_axes
    weights = "" if job.weights is None else f" --weights={job.weights}"
    sizes = ",".join(f"{axis}={size}" for axis, size in mesh.items()) or "data=1"
    return (
        f"Find a slice: m1-plan --job={job.name} --topology={generation}:{shape} --mesh={sizes} "
        f"--config={job.checkpoint} --seq={job.tokens} --batch={batch}{weights}"
    )


def _find_smallest_mesh(job: MemoryJob, num_devices: int) -> tuple[int, dict[str, int]] | None:
    """Return bytes and sizes of the mesh on which a device holds least, or None without one."""
    found = []
    for sizes in _iterate_meshes(job.mode, num_devices):
        shape = [sizes.get(axis, 1) for axis in sharding.MESH_AXES]
        # Sizes alone matter, so any objects do as devices.
        devices = np.array([_UnknownDevice(i) for i in range(num_devices)], object)
        try:
            layout = sharding.make_layout(
                Mesh(devices.reshape(shape), sharding.MESH_AXES), job.config, job.mode
            )
            size = sum(job.count_parts(layout, "bfloat16").values())
        except ValueError:  # the model does not divide so
            continue
        found.append((size, {axis: n for axis, n in sizes.items() if n > 1}))
    return min(found, key=lambda pair: pair[0], default=None)


def _iterate_meshes(mode: str, num_devices: int) -> Iterator[dict[str, int]]:
    """Yield two factors of the devices, on the axes that split parameters most in this mode."""
    first, second = ("fsdp", "expert") if mode == sharding.TRAIN else ("expert", "tensor")
    for size in range(1, num_devices + 1):
        if num_devices % size == 0:
            yield {first: num_devices // size, second: size}


@dataclasses.dataclass(frozen=True)
class _UnknownDevice:
    """Stands for a device of a slice that is not here."""

    id: int
    platform: str = "tpu"
    device_kind: str = "TPU"
    process_index: int = 0
