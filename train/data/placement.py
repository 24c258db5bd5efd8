"""Placement of a batch's rows onto the devices that they belong to."""

import dataclasses
from collections.abc import Mapping
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from m1_jax import sharding
from train.data import batch as batch_lib


def find_rows_by_process(
    layout: sharding.MeshLayout, num_rows: int
) -> Mapping[int, tuple[int, ...]]:
    """Return the rows of a global batch that each process's devices hold, in ascending order.

    A process may hold any set of rows: a mesh follows the torus of the chips, where a host is a
    block. Several processes hold the same rows where the mesh splits the length over them, or
    copies rows.
    """
    # From the sharding, not from the mesh: it alone says which rows a device holds.
    batch_sharding = layout.activation_sharding("batch", None)
    rows_by_process: dict[int, set[int]] = {}
    for device, index in batch_sharding.devices_indices_map((num_rows, 1)).items():
        rows = rows_by_process.setdefault(device.process_index, set())
        rows.update(range(*index[0].indices(num_rows)))
    return {process: tuple(sorted(rows)) for process, rows in rows_by_process.items()}


class BatchPlacement:
    """Puts this process's rows of a global batch onto its devices.

    Attributes:
      layout: layout of the trainer's mesh, or None for a single device.
      num_rows: number of rows in the global batch.
      row_numbers: numbers of the rows that this process reads, in ascending order.
    """

    def __init__(self, layout: sharding.MeshLayout | None, num_rows: int):
        """Find the rows of this process.

        Args:
          layout: layout of the trainer's mesh. None is a single device.
          num_rows: number of rows in the global batch.
        """
        self.layout, self.num_rows = layout, num_rows
        self.row_numbers = tuple(range(num_rows))
        if layout is not None:
            self.row_numbers = find_rows_by_process(layout, num_rows)[jax.process_index()]

    def device_put_batch(self, batch: batch_lib.HostTrainBatch) -> batch_lib.TrainBatch:
        """Return the global batch of which `batch` has this process's rows."""
        names = [field.name for field in dataclasses.fields(batch)]
        return batch_lib.TrainBatch(
            **{name: self.device_put_array(getattr(batch, name)) for name in names}
        )

    def device_put_array(self, local: np.ndarray) -> jax.Array:
        """Return the global array [num_rows, T] of a local one, which has `row_numbers` as rows."""
        if self.layout is None:
            return jnp.asarray(local)
        local_indices = {row: i for i, row in enumerate(self.row_numbers)}

        # JAX calls it for the index ranges of this process's devices, in global numbers. So every
        # process gives its own rows, and none needs the whole batch.
        def read_shard(index: Any) -> np.ndarray:
            rows = range(*index[0].indices(self.num_rows))
            # The view comes first: indexing by a list copies, and a row may have 1M tokens.
            return local[:, index[1]][[local_indices[row] for row in rows]]

        return jax.make_array_from_callback(
            (self.num_rows, local.shape[1]),
            self.layout.activation_sharding("batch", "length"),
            read_shard,
        )
