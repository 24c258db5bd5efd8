"""Rows of a batch onto the devices that they belong to."""

from typing import Any

import jax
import jax.numpy as jnp

from m1_jax import sharding


class BatchPlacement:
    """Puts this process's rows of a global batch where they belong.

    block, num_blocks: which part of the rows this process reads; processes whose devices hold the
    same rows (of other places in them) read the same part.
    """

    def __init__(self, layout: sharding.MeshLayout | None, num_rows: int):
        self.layout, self.num_rows = layout, num_rows
        self.block_index, self.num_blocks = 0, 1
        if layout is None:
            return
        where = layout.activation_sharding("batch", None).addressable_devices_indices_map(
            (num_rows, 1)
        )
        parts = [index[0] for index in where.values() if index is not None]
        held = {row for part in parts for row in range(*part.indices(num_rows))}
        self.first_row, size = min(held), len(held)
        if self.first_row % size or num_rows % size or max(held) - self.first_row + 1 != size:
            raise ValueError(
                f"mesh: this process's devices hold {size} scattered rows of {num_rows}; wanted "
                "neighbours. Put the data and fsdp axes over whole processes."
            )
        self.block_index, self.num_blocks = self.first_row // size, num_rows // size

    def __call__(self, tree: Any) -> Any:
        """Return global arrays [rows, T] of the local ones [rows / num_blocks, T]."""
        if self.layout is None:
            return jax.tree.map(jnp.asarray, tree)
        where = self.layout.activation_sharding("batch", "length")

        def one(local):
            def piece(index):
                start, stop, _ = index[0].indices(self.num_rows)
                return local[start - self.first_row : stop - self.first_row, index[1]]

            return jax.make_array_from_callback((self.num_rows, local.shape[1]), where, piece)

        return jax.tree.map(one, tree)
