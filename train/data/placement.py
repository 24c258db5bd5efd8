"""Placement of a batch's rows onto the devices that they belong to."""

import dataclasses
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from m1_jax import sharding
from train.data import batch as batch_lib


class BatchPlacement:
    """Puts this process's rows of a global batch onto its devices.

    Attributes:
      layout: layout of the trainer's mesh, or None for a single device.
      num_rows: number of rows in the global batch.
      block_index: number of the block of rows that this process reads.
      num_blocks: number of blocks. It is less than the number of processes where a mesh splits the
        length over processes: processes that hold different token ranges of the same rows read the
        same block.
      first_row: number of the block's first row, in the global batch.
    """

    def __init__(self, layout: sharding.MeshLayout | None, num_rows: int):
        """Find the block of this process.

        Args:
          layout: layout of the trainer's mesh. None is a single device.
          num_rows: number of rows in the global batch.

        Raises:
          ValueError: the rows of this process are not neighbours on the mesh.
        """
        self.layout, self.num_rows = layout, num_rows
        self.block_index, self.num_blocks, self.first_row = 0, 1, 0
        if layout is None:
            return
        # From the sharding, not from the mesh: it alone says which rows a device holds.
        batch_sharding = layout.activation_sharding("batch", None)
        indices = batch_sharding.addressable_devices_indices_map((num_rows, 1)).values()
        row_slices = [index[0] for index in indices if index is not None]
        rows = {row for part in row_slices for row in range(*part.indices(num_rows))}
        self.first_row, size = min(rows), len(rows)
        if self.first_row % size or num_rows % size or max(rows) - self.first_row + 1 != size:
            raise ValueError(
                f"mesh: this process's devices hold {size} scattered rows of {num_rows}; wanted "
                "neighbours. Put the data and fsdp axes over whole processes."
            )
        self.block_index, self.num_blocks = self.first_row // size, num_rows // size

    def device_put_batch(self, batch: batch_lib.HostTrainBatch) -> batch_lib.TrainBatch:
        """Return the global batch of which `batch` has this process's rows."""
        names = [field.name for field in dataclasses.fields(batch)]
        return batch_lib.TrainBatch(
            **{name: self.device_put_array(getattr(batch, name)) for name in names}
        )

    def device_put_array(self, local: np.ndarray) -> jax.Array:
        """Return the global array [rows, T] of a local one [rows / num_blocks, T]."""
        if self.layout is None:
            return jnp.asarray(local)

        # JAX calls it for the index ranges of this process's devices, in global numbers. So every
        # process gives its own rows, and none needs the whole batch.
        def read_shard(index: Any) -> np.ndarray:
            start, stop, _ = index[0].indices(self.num_rows)
            return local[start - self.first_row : stop - self.first_row, index[1]]

        return jax.make_array_from_callback(
            (self.num_rows, local.shape[1]),
            self.layout.activation_sharding("batch", "length"),
            read_shard,
        )
