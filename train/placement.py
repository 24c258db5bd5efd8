"""Rows of a batch onto the devices that they belong to."""

from typing import Any

import jax
import jax.numpy as jnp

from m1_jax import sharding


class Placement:
    """Puts this process's rows of a global batch where they belong.

    block, num_blocks: which part of the rows this process reads; processes whose devices hold the
    same rows (of other places in them) read the same part.
    """

    def __init__(self, layout: sharding.Layout | None, rows: int):
        self.layout, self.rows = layout, rows
        self.block, self.num_blocks = 0, 1
        if layout is None:
            return
        where = layout.array("batch", None).addressable_devices_indices_map((rows, 1))
        parts = [index[0] for index in where.values() if index is not None]
        held = {row for part in parts for row in range(*part.indices(rows))}
        self.first, size = min(held), len(held)
        if self.first % size or rows % size or max(held) - self.first + 1 != size:
            raise ValueError(
                f"mesh: this process's devices hold {size} scattered rows of {rows}; wanted "
                "neighbours. Put the data and fsdp axes over whole processes."
            )
        self.block, self.num_blocks = self.first // size, rows // size

    def __call__(self, tree: Any) -> Any:
        """Return global arrays [rows, T] of the local ones [rows / num_blocks, T]."""
        if self.layout is None:
            return jax.tree.map(jnp.asarray, tree)
        where = self.layout.array("batch", "length")

        def one(local):
            def piece(index):
                start, stop, _ = index[0].indices(self.rows)
                return local[start - self.first : stop - self.first, index[1]]

            return jax.make_array_from_callback((self.rows, local.shape[1]), where, piece)

        return jax.tree.map(one, tree)
