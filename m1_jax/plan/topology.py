"""TPU slices by name, and their devices to compile for, without a TPU."""

import dataclasses
import math
import os
import re

from jax.experimental import topologies


@dataclasses.dataclass(frozen=True)
class TpuGeneration:
    """dims: numbers in a slice's name. most: chips of the largest slice. devices: per chip."""

    num_dims: int
    max_chips: int
    example: str
    devices_per_chip: int = 1


TPU_GENERATIONS = {
    "v5e": TpuGeneration(2, 256, "v5e:16x16"),
    "v5p": TpuGeneration(3, 6144, "v5p:8x8x8"),
    "v6e": TpuGeneration(2, 256, "v6e:16x16"),
    "tpu7x": TpuGeneration(3, 9216, "tpu7x:4x4x8", devices_per_chip=2),
}


class TopologyError(ValueError):
    """A slice that does not exist, or no compiler for it; the message says what to do."""


@dataclasses.dataclass(frozen=True)
class TpuSlice:
    """What a name like v5p:8x8x8 stands for. num_slices: how many, joined by the data network."""

    generation: str
    shape: tuple[int, ...]
    num_slices: int = 1

    @property
    def name(self) -> str:
        return f"{self.generation}:{'x'.join(map(str, self.shape))}"

    @property
    def num_chips(self) -> int:
        return math.prod(self.shape) * self.num_slices

    @property
    def num_devices(self) -> int:
        return self.num_chips * TPU_GENERATIONS[self.generation].devices_per_chip


def parse_slice(name: str, num_slices: int = 1) -> TpuSlice:
    """Read a slice's name.

    Raises:
      TopologyError: a name of another form, or a slice larger than there are.
    """
    examples = ", ".join(g.example for g in TPU_GENERATIONS.values())
    found = re.fullmatch(r"(\w+):(\d+(?:x\d+)*)", name)
    generation = TPU_GENERATIONS.get(found[1]) if found else None
    if found is None or generation is None:
        raise TopologyError(f"topology: got {name!r}; wanted one like {examples}")
    shape = tuple(map(int, found[2].split("x")))
    if len(shape) != generation.num_dims or not 1 <= math.prod(shape) <= generation.max_chips:
        raise TopologyError(
            f"topology: got {name!r}; wanted {generation.num_dims} numbers and at most "
            f"{generation.max_chips} chips, like {generation.example}"
        )
    if num_slices < 1:
        raise TopologyError(f"slices: got {num_slices}; wanted at least 1")
    return TpuSlice(found[1], shape, num_slices)


def get_slice_devices(tpu_slice: TpuSlice) -> list:
    """Return devices that programs can be compiled for, those of one slice after another.

    Raises:
      TopologyError: libtpu is missing, or does not know this slice.
    """
    # Only compiles: asks no metadata server for a TPU, and may run beside another such process.
    os.environ.setdefault("TPU_SKIP_MDS_QUERY", "1")
    os.environ.setdefault("ALLOW_MULTIPLE_LIBTPU_LOAD", "1")
    more = {"num_slices": tpu_slice.num_slices} if tpu_slice.num_slices > 1 else {}
    try:
        found = topologies.get_topology_desc(
            platform="tpu", topology_name=tpu_slice.name, **more
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
    if len(found) != tpu_slice.num_devices:
        raise TopologyError(
            f"topology {tpu_slice.name}: got {len(found)} devices; wanted {tpu_slice.num_devices}"
        )
    return list(found)
