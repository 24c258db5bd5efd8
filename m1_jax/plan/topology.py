"""TPU slices by name, and their devices to compile for, without a TPU."""

import dataclasses
import itertools
import math
import os
import re
from collections.abc import Sequence
from typing import Any

from jax.experimental import topologies

from m1_jax import physical_mesh


@dataclasses.dataclass(frozen=True)
class TpuGeneration:
    """A generation of TPUs, as far as names of slices go."""

    num_dims: int  # numbers in a slice's name
    max_chips: int  # chips of the largest slice
    example: str  # a slice that exists, for error messages
    # A dimension closes to a ring in multiples of so many chips, on slices whose dimensions all are
    # at least `min_closed_chips`.
    ring_chips: int
    min_closed_chips: int = 1
    devices_per_chip: int = 1  # that JAX sees


TPU_GENERATIONS = {
    # Pods of 16x16: a dimension that is less than the pod's ends in open links.
    "v5e": TpuGeneration(2, 256, "v5e:16x16", ring_chips=16),
    # Cubes of 4x4x4, whose faces optical switches join. Google's page of v5p: "All 4x4x4 and larger
    # slices (one cube) have full 3D torus" connections.
    "v5p": TpuGeneration(3, 6144, "v5p:8x8x8", ring_chips=4, min_closed_chips=4),
    "v6e": TpuGeneration(2, 256, "v6e:16x16", ring_chips=16),
    "tpu7x": TpuGeneration(
        3, 9216, "tpu7x:4x4x8", ring_chips=4, min_closed_chips=4, devices_per_chip=2
    ),
}


class TopologyError(ValueError):
    """A slice that does not exist, or no compiler for it. The message says what to do."""


@dataclasses.dataclass(frozen=True)
class TpuSlice:
    """What a name like v5p:8x8x8 stands for."""

    generation: str  # a key of `TPU_GENERATIONS`
    shape: tuple[int, ...]  # chips along each dimension
    num_slices: int = 1  # slices of this shape, joined by the data network

    @property
    def name(self) -> str:
        return f"{self.generation}:{'x'.join(map(str, self.shape))}"

    @property
    def num_chips(self) -> int:
        return math.prod(self.shape) * self.num_slices

    @property
    def closed_dims(self) -> tuple[bool, ...]:
        """Say of each dimension whether links join its ends, so that it is a ring.

        Slices of cubes can also be had as twisted tori, which no plan knows of.
        """
        generation = TPU_GENERATIONS[self.generation]
        can_close = min(self.shape) >= generation.min_closed_chips
        return tuple(can_close and size % generation.ring_chips == 0 for size in self.shape)

    @property
    def num_devices(self) -> int:
        return self.num_chips * TPU_GENERATIONS[self.generation].devices_per_chip


def parse_slice(name: str, num_slices: int = 1) -> TpuSlice:
    """Read a slice's name.

    Raises:
      TopologyError: a name of another form, or a slice larger than there are.
    """
    examples = ", ".join(g.example for g in TPU_GENERATIONS.values())
    match = re.fullmatch(r"(\w+):(\d+(?:x\d+)*)", name)
    generation = TPU_GENERATIONS.get(match[1]) if match else None
    if match is None or generation is None:
        raise TopologyError(f"topology: got {name!r}; wanted one like {examples}")
    shape = tuple(map(int, match[2].split("x")))
    if len(shape) != generation.num_dims or not 1 <= math.prod(shape) <= generation.max_chips:
        raise TopologyError(
            f"topology: got {name!r}; wanted {generation.num_dims} numbers and at most "
            f"{generation.max_chips} chips, like {generation.example}"
        )
    if num_slices < 1:
        raise TopologyError(f"slices: got {num_slices}; wanted at least 1")
    return TpuSlice(match[1], shape, num_slices)


def find_slice_of_whole_axes(tpu_slice: TpuSlice, mesh_shape: Sequence[int]) -> TpuSlice | None:
    """Return a slice of as many chips, with whole dimensions for every mesh axis, or None.

    Of several it takes the one whose longest dimension is shortest. It has closed dimensions where
    the given slice has.

    Args:
      tpu_slice: the slice whose mesh cuts dimensions.
      mesh_shape: sizes of the mesh axes.
    """
    if tpu_slice.num_slices > 1:
        return None
    generation = TPU_GENERATIONS[tpu_slice.generation]
    unit = generation.ring_chips if all(tpu_slice.closed_dims) else 2
    num_chips = tpu_slice.num_chips
    sizes = [size for size in range(unit, num_chips + 1, unit) if num_chips % size == 0]
    found = []
    # Slices are named with ascending sizes.
    for shape in itertools.combinations_with_replacement(sizes, generation.num_dims - 1):
        last, remainder = divmod(num_chips, math.prod(shape))
        if remainder or last < shape[-1] or last % unit:
            continue
        physical_shape = (*shape, last, generation.devices_per_chip)
        if physical_mesh.find_whole_axes(mesh_shape, physical_shape):
            found.append(TpuSlice(tpu_slice.generation, (*shape, last)))
    return min(found, key=lambda other: max(other.shape), default=None)


def get_slice_devices(tpu_slice: TpuSlice) -> list[Any]:
    """Return devices that programs can be compiled for, those of one slice after another.

    Raises:
      TopologyError: libtpu is missing, or does not know this slice.
    """
    # This process only compiles. So libtpu must not ask a metadata server for a TPU, and may be
    # loaded by several processes at once.
    os.environ.setdefault("TPU_SKIP_MDS_QUERY", "1")
    os.environ.setdefault("ALLOW_MULTIPLE_LIBTPU_LOAD", "1")
    options: dict[str, Any] = {}
    if tpu_slice.num_slices > 1:
        options["num_slices"] = tpu_slice.num_slices
    if any(tpu_slice.closed_dims):
        # By default the compiler takes all dimensions for open, and its collectives differ.
        # It wants three numbers, also of slices with two dimensions.
        options["wrap"] = [*tpu_slice.closed_dims, False][:3]
    try:
        devices = topologies.get_topology_desc(
            platform="tpu", topology_name=tpu_slice.name, **options
        ).devices
    except Exception as error:  # jaxlib raises several kinds
        reason = str(error).splitlines()[0]
        if "not installed" in reason or isinstance(error, OSError):
            raise TopologyError(
                f"the TPU compiler cannot be loaded: {reason}. Install it: pip install libtpu"
            ) from None
        examples = ", ".join(g.example for g in TPU_GENERATIONS.values())
        raise TopologyError(
            f"topology: the compiler refuses {tpu_slice.name!r}: {reason}. Others: {examples}"
        ) from None
    if len(devices) != tpu_slice.num_devices:
        raise TopologyError(
            f"topology {tpu_slice.name}: got {len(devices)} devices; wanted {tpu_slice.num_devices}"
        )
    return list(devices)
