"""What a checkpoint holds: bytes of each host, and the files that Orbax writes of them."""

import collections
import dataclasses
import math
from collections.abc import Iterable
from typing import Any

from train import checkpoints
from train import step as step_lib

# Orbax 0.12 closes a file of OCDBT at these sizes, in a bucket and elsewhere. It writes one set of
# files for each host, and then one index over all of them.
BUCKET_FILE_BYTES, LOCAL_FILE_BYTES = 400 * 2**20, 2**31


@dataclasses.dataclass(frozen=True)
class CheckpointSize:
    """A checkpoint of the state.

    Attributes:
      total_bytes: float32 parameters that are trained and their moments.
      host_bytes: the most that one host writes.
      num_writers: hosts that write.
      num_arrays: arrays, each with its metadata.
      num_files: files of array data, at least.
      largest_bytes: the largest file of them.
      largest_array_bytes: largest array, of all hosts.
      restored_bytes: the most that one host reads into its own chips.
    """

    total_bytes: int
    host_bytes: int
    num_writers: int
    num_arrays: int
    num_files: int
    largest_bytes: int
    largest_array_bytes: int
    restored_bytes: int


def measure_checkpoint(state: step_lib.TrainState, directory: str) -> CheckpointSize:
    """Return the size of a state's checkpoint. The state is of shapes with shardings.

    Args:
      state: shapes, as `RunModel.abstract_state` gives them.
      directory: `SaveConfig.directory`. Buckets have smaller files.
    """
    leaves = checkpoints.flatten_state(state)
    written: collections.Counter[int] = collections.Counter()
    restored: collections.Counter[int] = collections.Counter()
    total, largest_array = 0, 0
    for leaf in leaves.values():
        size = math.prod(leaf.shape) * leaf.dtype.itemsize
        total, largest_array = total + size, max(largest_array, size)
        for process, shard_bytes, is_first in _list_shards(leaf):
            restored[process] += shard_bytes
            if is_first:  # one copy of each shard is written
                written[process] += shard_bytes
    file_bytes = BUCKET_FILE_BYTES if "://" in directory else LOCAL_FILE_BYTES
    return CheckpointSize(
        total_bytes=total,
        host_bytes=max(written.values()),
        num_writers=len(written),
        num_arrays=len(leaves),
        num_files=sum(-(-size // file_bytes) for size in written.values()),
        largest_bytes=min(file_bytes, max(written.values())),
        largest_array_bytes=largest_array,
        restored_bytes=max(restored.values()),
    )


def _list_shards(leaf: Any) -> Iterable[tuple[int, int, bool]]:
    """Yield (process, bytes, whether it is the first copy) of an array's part on each device."""
    sharding = leaf.sharding
    if sharding is None:  # a number without a place lies on all devices, and is written once
        yield 0, leaf.dtype.itemsize * math.prod(leaf.shape), True
        return
    shard_bytes = math.prod(sharding.shard_shape(leaf.shape)) * leaf.dtype.itemsize
    seen: set[tuple] = set()
    for device, index in sharding.devices_indices_map(leaf.shape).items():
        key = tuple((part.start, part.stop) for part in index)
        yield device.process_index, shard_bytes, key not in seen
        seen.add(key)
